"""The ledger's states, in a small checkout of its own, and the README's table made from files."""

import json
from xml.etree import ElementTree

import pytest

from fusedpeft.bench import ledger, readme, record, report, sources
from fusedpeft.errors import InputError

KERNEL = """import triton
from fusedpeft.kernels.tables import TILE

@triton.jit
def _toy_kernel(x_ptr):
    pass
"""
HELPER = "TILE = 64\n"
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_toy_gpu" name="test_a" time="0.5"/>
<testcase classname="tests.gpu.test_toy_gpu.TestB" name="test_b" time="1"/>
<testcase classname="tests.gpu.test_toy_gpu" name="test_c"><skipped message="no"/></testcase>
{extra}</testsuite></testsuites>"""
FAILURE = """<testcase classname="tests.gpu.test_toy_gpu" name="test_d">
<failure message="max 3 > 1&#10;more"/></testcase>"""
ROW = {
    "op": "toy", "case": "fwd M8", "impl": "fusedpeft", "dtype": "bf16", "device": "GPU X",
    "median_us": 12.5, "p20_us": 12.0, "p80_us": 13.0, "gb_per_s": 1.0, "tflop_per_s": 1.0,
    "pct_of_ceiling": 81.0, "peak_bytes": 0, "error": 0.0, "commit": "abc1234", "ratio": 1.03,
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "kernels" / "toy.py").write_text(KERNEL)
    (tmp_path / "kernels" / "tables.py").write_text(HELPER)
    (tmp_path / "csrc" / "cuda" / "other.cu").write_text('#include "c.h"\n__global__ void f() {}\n')
    (tmp_path / "csrc" / "cuda" / "c.h").write_text("// one\n")
    return tmp_path


def gpu_run(root, extra="", cuda=True, rows=(ROW,)):
    """What a run of bench/gpu.sh leaves behind, for the sources as they are now."""
    out = root / "bench" / "results" / "gpu-x"
    junit = root / "tests.xml"
    junit.write_text(JUNIT.format(extra=extra))
    environment = {
        "device": "GPU X", "cuda": cuda, "driver": "1.2", "versions": {"torch": "2.11.0"},
        "commit": "abc1234", "date": "2026-01-02", "sources": sources.hashes(root),
    }  # fmt: skip
    report.write_json(out / record.ENVIRONMENT, environment)
    report.write_json(out / record.TESTS, record.tests_of(junit))
    report.write_json(out / "toy.json", list(rows))
    return out


def states(root):
    return {e.kernel: (e.state, e.text) for e in ledger.ledger(root)}


def test_only_files_with_kernels_are_listed(root):
    assert list(states(root)) == ["kernels/toy.py", "csrc/cuda/other.cu"]


def test_never_run(root, capsys):
    assert states(root)["kernels/toy.py"] == (
        "unverified",
        "unverified (never run on a GPU)",
    )
    ledger.print_ledger(root)
    assert "0 verified, 2 unverified, 0 failed" in capsys.readouterr().out


def test_verified_then_changed_then_verified_again(root, capsys):
    gpu_run(root)
    assert states(root)["kernels/toy.py"] == ("verified", "verified on GPU X at abc1234")
    assert states(root)["csrc/cuda/other.cu"][0] == "unverified"  # no test of it ran

    ledger.print_ledger(root)
    printed = capsys.readouterr().out
    assert "12.5" in printed and "1.030" in printed and "2026-01-02" in printed

    kernel = root / "kernels" / "toy.py"
    kernel.write_text(KERNEL + "# faster\n")
    state, text = states(root)["kernels/toy.py"]
    assert state == "unverified"
    assert text == "unverified (changed since it passed at abc1234 on GPU X)"
    ledger.print_ledger(root)
    assert "the source has changed since" in capsys.readouterr().out

    kernel.write_text(KERNEL)
    assert states(root)["kernels/toy.py"][0] == "verified"


def test_a_changed_dependency_counts(root):
    gpu_run(root)
    (root / "kernels" / "tables.py").write_text("TILE = 128\n")
    assert states(root)["kernels/toy.py"][0] == "unverified"
    before = sources.hashes(root)["csrc/cuda/other.cu"]
    (root / "csrc" / "cuda" / "c.h").write_text("// two\n")
    assert sources.hashes(root)["csrc/cuda/other.cu"] != before


def test_a_failed_test_fails_the_kernel(root):
    out = gpu_run(root, extra=FAILURE)
    assert states(root)["kernels/toy.py"] == ("failed", "failed on GPU X")
    tests = json.loads((out / "tests.json").read_text())
    assert [t["outcome"] for t in tests] == ["passed", "passed", "skipped", "failed"]
    assert tests[3]["message"] == "max 3 > 1" and tests[1]["file"] == "test_toy_gpu"


def test_a_cpu_run_verifies_nothing(root):
    gpu_run(root, cuda=False)
    assert states(root)["kernels/toy.py"][1] == "unverified (never run on a GPU)"


def test_skipped_tests_verify_nothing(root):
    out = gpu_run(root)
    tests = json.loads((out / "tests.json").read_text())
    for t in tests:
        t["outcome"] = "skipped"
    report.write_json(out / "tests.json", tests)
    assert states(root)["kernels/toy.py"][1] == "unverified (never run on a GPU)"
    nothing = '<testcase classname="t.test_toy" name="a"><skipped message="no GPU"/></testcase>'
    (root / "none.xml").write_text(f"<testsuites>{nothing}</testsuites>")
    assert record.main(["--root", str(root), "--out", str(out), "--junit", str(root / "none.xml")])


def test_tests_speak_for_a_kernel_by_name_and_import(root):
    (root / "csrc" / "cuda" / "toy.cu").write_text("__global__ void g() {}\n")
    (root / "kernels" / "big.py").write_text(
        "import triton\nfrom fusedpeft.kernels import toy\n\n@triton.jit\ndef _big_kernel(): pass\n"
    )
    assert sources.covers("toy", root) == {"kernels/toy.py"}
    assert sources.covers("toy_gpu", root) == {"kernels/toy.py"}
    assert sources.covers("toy_cuda", root) == {"csrc/cuda/toy.cu"}
    assert sources.covers("other", root) == {"csrc/cuda/other.cu"}
    assert sources.covers("big", root) == {"kernels/big.py", "kernels/toy.py"}
    assert sources.covers("nothing", root) == set()


def test_the_real_kernels_are_known_and_their_tests_speak_for_them():
    root = report.repo_root()
    if root is None:
        pytest.skip("an installed wheel carries no sources")
    known = sources.hashes(root)
    assert {"kernels/lora.py", "kernels/lora_gemm.py", "kernels/lora_bwd.py"} <= set(known)
    assert sources.covers("lora_gpu", root) >= {"kernels/lora.py", "kernels/lora_bwd.py"}


def test_broken_files_are_named(root):
    out = gpu_run(root)
    (out / "tests.json").write_text("[")
    with pytest.raises(InputError, match="tests.json: expected JSON"):
        ledger.ledger(root)
    with pytest.raises(InputError, match="expected a junit file"):
        record.tests_of(root / "missing.xml")
    with pytest.raises(InputError, match="expected a source checkout"):
        record.checkout(root / "bench")


PAGE = f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\ntail\n"


def test_readme_table_comes_from_the_files_alone(root, capsys):
    peers = [ROW | {"impl": "peft", "ratio": 1.31}, ROW | {"impl": "reference", "ratio": 1.2}]
    floor = ROW | {"impl": "frozen", "ratio": 1.0}
    ours = ROW | {"impl": "accelerated", "ratio": 0.5}  # no peer
    out = gpu_run(root, rows=[ROW, *peers, ours, floor, ROW | {"case": "fwd M16", "ratio": 0.93}])
    (root / "README.md").write_text(PAGE)
    assert readme.main(["--root", str(root), "--check"]) == 1
    assert (root / "README.md").read_text() == PAGE
    assert readme.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n\n") and text.endswith("tail\n") and "old" not in text
    assert "| toy fwd | bf16 | frozen | 2 | **0.98** | 0.93–1.03 | reference 1.20 |" in text
    assert "commit abc1234" in text and "driver 1.2" in text
    assert "verified on GPU X at abc1234: `kernels/toy.py`" in text
    tables = (out / "README.md").read_text()
    heads = "| toy | dtype | µs | × frozen | peft × frozen | reference × frozen | accelerated × fro"
    assert heads in tables
    assert "| fwd M8 | bf16 | 12.5 | **1.03** | 1.31 | 1.20 | 0.50 | 81 |" in tables
    assert "1 further shapes of toy: median 0.93 × frozen, worst 0.93 × (fwd M16, bf16)" in tables
    assert readme.main(["--root", str(root), "--check"]) == 0
    picture = out / readme.CHART
    dots = ElementTree.parse(picture).findall(".//{*}circle")
    assert len(dots) == 2 + 2 + 2  # the legend, ours, the peers
    picture.write_text("old")
    assert readme.main(["--root", str(root), "--check"]) == 1
    assert "bench/results/gpu-x/ratios.svg: out of date" in capsys.readouterr().out
    assert picture.read_text() == "old"


def test_readme_says_when_there_is_nothing(root):
    assert "No measurement is committed yet." in readme.measured(root)
    assert "never run on a GPU" in readme.measured(root)
    with pytest.raises(InputError, match="expected the markers"):
        readme.rewrite("no markers", "x")
