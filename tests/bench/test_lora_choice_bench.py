"""From the results of a GPU run to the table that chooses between Triton and cuBLAS."""

import json

import pytest

from fusedpeft.bench import lora_choice as command
from fusedpeft.errors import InputError
from fusedpeft.ops.lora_choice import choose

TIMES = {  # case -> (Triton's µs, cuBLAS's); made up
    "fwd 4096->14336 M8192 R16": (1000.0, 1100.0),
    "bwd 4096->14336 M8192 R16": (1300.0, 1200.0),
    "decode 4096->4096 M16 R16": (9.0, 15.0),
}


def run_of(root, cuda=True, impls=(command.TRITON, command.ATEN)):
    out = root / "bench" / "results" / "chip"
    out.mkdir(parents=True)
    (root / "kernels").mkdir(exist_ok=True)
    (root / "pyext" / "ops").mkdir(parents=True)
    environment = {"device": "chip", "cuda": cuda, "capability": "9.0", "versions": {"cuda": "13"}}
    (out / "environment.json").write_text(json.dumps(environment))
    rows = [
        dict(
            op="lora_linear", case=c, dtype="bf16", impl=i, median_us=us, device="chip", commit="x"
        )
        for c, times in TIMES.items()
        for i, us in zip(impls, times, strict=False)
    ]
    (out / "lora.json").write_text(json.dumps(rows))


def test_a_gpu_run_becomes_the_table_and_the_table_chooses(tmp_path, capsys):
    run_of(tmp_path)
    assert command.main(["--root", str(tmp_path)]) == 0
    assert "3 measured cases" in capsys.readouterr().out
    rows = json.loads((tmp_path / "pyext/ops/lora_choice.json").read_text())["rows"]
    assert rows[0] == dict(
        device="chip", commit="x", arch="sm_90", kind="fwd", m=8192, n=14336, k=4096, r=16,
        elem_bytes=2, triton_us=1000.0, cublas_us=1100.0,
    )  # fmt: skip
    assert {r["kind"] for r in rows} == {"fwd", "bwd"}
    sizes = (8192, 14336, 4096, 16, "sm_90")
    impl, why = choose("fwd", *sizes, rows=rows)
    assert impl == "triton" and why.startswith("measured on chip at 8192 × 14336 × 4096: Triton 10")
    assert choose("bwd", *sizes, rows=rows)[0] == "cublas"


@pytest.mark.parametrize("kwargs", [dict(cuda=False), dict(impls=(command.TRITON,))])
def test_no_run_that_timed_both(tmp_path, kwargs):
    run_of(tmp_path, **kwargs)
    with pytest.raises(InputError, match="expected a CUDA run .* got none"):
        command.main(["--root", str(tmp_path)])
    assert not (tmp_path / "pyext/ops/lora_choice.json").exists()
