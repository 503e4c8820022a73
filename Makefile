# The only two commands a fresh machine needs: `make demo` and `make test`
# (Python 3.10-3.13 with venv, a C++ compiler, make). PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Our folder `kernels` must not be importable from the repository root: see pyproject.toml.
export PYTHONSAFEPATH := 1
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint bench doctor clean

demo: $(READY)
	$(BIN)/fusedpeft run examples/quickstart.yaml
	@echo "Open runs/quickstart/report.html"

# Two files at a time: most of it is one thread, a compiler's or Python's. In the order of
# tests/conftest.py; xdist's own puts files of few tests last, which are the longest.
test: $(READY)
	$(BIN)/python -m pytest -m "not gpu and not slow" -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/fusedpeft bench lora --device cpu

doctor: $(READY)
	$(BIN)/fusedpeft doctor

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist runs *.egg-info pyext/_C*.so
