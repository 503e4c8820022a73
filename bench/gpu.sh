#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes, on a bare machine without internet:
# build, tests, compute-sanitizer, the ahead-of-time table, the benches, the ledger.
#
#   bench/gpu.sh                    results to $OUT, else bench/results/<device>/, to be committed
#   bench/gpu.sh tests|bench        one half of it, with all the time for that half
#   FUSEDPEFT_GPU_DRYRUN=1 bench/gpu.sh    the same plumbing over a few CPU cases; nothing verified
#
# Needs Python >= 3.10 with torch, triton, transformers, pytest and setuptools; nvcc and ninja for
# the CUDA half. PYTHON chooses the interpreter, FUSEDPEFT_COMMIT names the commit where the copy
# has no .git, LIMIT_S is the whole run's limit. A failed step does not stop the next.
# Exit: 0 all passed, 1 a step failed, 2 no torch, 3 no CUDA device.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
PYTHON=${PYTHON:-python3}
[[ $PYTHON == */* && $PYTHON != /* ]] && PYTHON=$PWD/$PYTHON
DRY=${FUSEDPEFT_GPU_DRYRUN:-0}
PART=${1:-all}
case $PART in all | tests | bench) ;; *) echo "gpu.sh: expected tests, bench or nothing, got $PART" && exit 2 ;; esac
OPS=(lora lora_multi multi_lora multi_lora_model lora_quantised linear_logprob adapter adapter_decode
  prefix_attention prefix_decode pro_step soft_prompt methods)
LIMIT_S=${LIMIT_S:-570}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET

probe() { "$PYTHON" -c "import torch; $1" 2>/dev/null; }

if [ "$DRY" = 1 ]; then
  DEVICE=cpu
  OUT=${OUT:-$(mktemp -d)}
  NAME="dry run on the CPU"
else
  probe pass || { echo "gpu.sh: $PYTHON cannot import torch; set PYTHON" && exit 2; }
  if ! probe 'raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no CUDA device: nothing to verify (is it a CUDA build of torch that $PYTHON has?)"
    exit 3
  fi
  DEVICE=cuda
  NAME=$(probe 'print(torch.cuda.get_device_name())')
  OUT=${OUT:-bench/results/$(tr '[:upper:]' '[:lower:]' <<<"$NAME" | tr -cs 'a-z0-9\n' '-')}
  # Only this GPU's architecture: a build for four takes longer than everything else.
  export FUSEDPEFT_CUDA_ARCHS=${FUSEDPEFT_CUDA_ARCHS:-$(probe \
    'a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a >= 9 else ""))')}
fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
echo "gpu.sh: $NAME; results in $OUT"

SUMMARY=()
FAILED=0
RESERVE=25 # seconds kept for the ledger
# step NAME SECONDS COMMAND...: runs it under a limit, logs it, remembers how it ended.
step() {
  local name=$1 limit=$2 left=$((LIMIT_S - RESERVE - SECONDS)) start=$SECONDS code
  shift 2
  if [ "$left" -lt 5 ]; then
    SUMMARY+=("$name: FAILED (no time left of $LIMIT_S s)")
    FAILED=1
    return 1
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) SUMMARY+=("$name: passed ($((SECONDS - start)) s)") ;;
    124 | 137) SUMMARY+=("$name: FAILED (over its limit of $limit s)") && FAILED=1 ;;
    *) SUMMARY+=("$name: FAILED (exit $code, $((SECONDS - start)) s; $name.log)") && FAILED=1 ;;
  esac
  return "$code"
}
skip() { SUMMARY+=("$1: skipped ($2)"); }
importable() { (cd "$WORK" && "$PYTHON" -c 'import torch, fusedpeft.kernels, fusedpeft.bench, fusedpeft._C' 2>/dev/null); }

# Without a writable site: the extension beside the sources, and a tree of links as the package.
in_place() {
  "$PYTHON" setup.py build_ext --inplace || return
  mkdir -p "$WORK/site/fusedpeft"
  ln -s "$ROOT"/pyext/* "$WORK/site/fusedpeft/"
  ln -s "$ROOT/kernels" "$ROOT/bench" "$WORK/site/fusedpeft/"
}
build() {
  "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index -e . && return
  echo "pip could not install here; building in place"
  in_place
}
export -f build in_place
export PYTHON ROOT WORK PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"

# --- the steps ----------------------------------------------------------------------------------
if [ "$DRY" = 1 ]; then
  step build 60 "$PYTHON" -c 'import fusedpeft.bench'
else
  step build 180 bash -c build
  importable || { SUMMARY+=("import: FAILED (fusedpeft._C does not import)") && FAILED=1; }
fi

# An older run must not speak for this one.
rm -f "$OUT/environment.json"
[ "$PART" = bench ] || rm -f "$OUT/tests.json"
[ "$PART" = tests ] || for op in "${OPS[@]}"; do rm -f "$OUT/$op.json"; done
step environment 60 "$PYTHON" -m fusedpeft.bench.record --out "$OUT" --device "$DEVICE" --root "$ROOT"

if [ "$PART" != bench ]; then
  TESTS=(-m gpu tests/gpu)
  [ "$DRY" = 1 ] && TESTS=(tests/bench/test_harness.py)
  # Most of a GPU test is Triton compiling on one core.
  [ "$DRY" != 1 ] && probe 'import xdist' && TESTS+=(-n 6)

  step tests 330 "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml="$WORK/tests.xml" "${TESTS[@]}"
  if [ -f "$WORK/tests.xml" ]; then
    step results 30 "$PYTHON" -m fusedpeft.bench.record --out "$OUT" --junit "$WORK/tests.xml" --root "$ROOT"
  fi

  if [ "$DRY" = 1 ]; then
    skip sanitizer "dry run"
  elif ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "compute-sanitizer is not installed"
  elif ! compgen -G 'tests/gpu/*cuda*.py' >/dev/null; then
    skip sanitizer "no tests/gpu/*cuda*.py: no CUDA op to check yet"
  else
    step sanitizer 90 compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu/*cuda*.py
  fi
fi

if [ "$DRY" = 1 ]; then
  step bench_lora 120 "$PYTHON" -m fusedpeft.bench lora --device cpu --seconds 0.05 \
    --case 'decode M4 768->768 bf16' --impl fusedpeft --json "$OUT/lora.json"
  skip aot "dry run"
elif [ "$PART" != tests ]; then
  # The first cases of each op are those with a bar; the rest of them where time is left.
  SHARE=$(((LIMIT_S - RESERVE - SECONDS) / (${#OPS[@]} + 2)))
  for op in "${OPS[@]}"; do
    step "bench_$op" $((SHARE + 15)) "$PYTHON" -m fusedpeft.bench "$op" --device cuda --seconds 0.3 \
      --budget "$SHARE" --json "$OUT/$op.json"
  done
  ARCH=$(probe 'print("sm_90" if torch.cuda.get_device_capability()[0] >= 9 else "sm_80")')
  step aot 90 "$PYTHON" -m fusedpeft.bench aot --arch "$ARCH" --every 8 --check \
    --json "$OUT/aot.json" --jobs "$(nproc)"
fi

RESERVE=0
step ledger 30 "$PYTHON" -m fusedpeft.bench --ledger --root "$ROOT"

{
  echo "gpu.sh: $NAME, $SECONDS s"
  printf '  %s\n' "${SUMMARY[@]}"
  [ "$DRY" = 1 ] && echo "  dry run: no GPU was used, nothing is verified"
  [ "$FAILED" = 0 ] && echo "  all steps passed" || echo "  SOME STEPS FAILED"
} | tee "$OUT/summary.log"
exit "$FAILED"
