"""The LoRA bench from the outside: small cases, real contestants, bad input."""

import json
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from fusedpeft.bench import bench_lora, lora_impls
from fusedpeft.bench.cli import app
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.bench.harness import run_case
from fusedpeft.bench.run import run_op
from fusedpeft.errors import InputError

CPU = torch.device("cpu")
QUICK = {"seconds": 0.0, "min_rounds": 2}
EAGER = ("fusedpeft", "reference", "addmm", "peft", "frozen")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, m", [("fwd", 3), ("train", 40), ("bwd", 40)])
def test_every_contestant_is_right(kind, m, dtype):
    pytest.importorskip("peft")
    case = lora_impls.make_case(kind, m, 96, 64, 8, dtype, CPU, EAGER, warm=True)
    timings = run_case(case, **QUICK)
    assert {t.name for t in timings} == set(EAGER)
    assert all(t.median_us > 0 for t in timings)


def test_a_wrong_contestant_is_named(monkeypatch):
    def wrong(x, s):
        return lora_impls._reference(x, s) * 1.01

    monkeypatch.setattr(lora_impls, "_fusedpeft", wrong)
    case = lora_impls.make_case("fwd", 4, 96, 64, 8, torch.float32, CPU, EAGER[:3], warm=True)
    with pytest.raises(BenchMismatch, match="fusedpeft.y"):
        run_case(case, **QUICK)


def test_weights_of_a_cold_case_are_copies():
    case = lora_impls.make_case("fwd", 1, 256, 256, 4, torch.float32, CPU, ("frozen",))
    assert case.sets > 100  # 256 KiB against an L3 of megabytes
    assert torch.equal(case.impls[0].build(0)(), case.impls[0].build(case.sets - 1)())


def test_work_of_a_square_case():
    flops, moved = lora_impls._work("fwd", 4, 2048, 1024, 16, 2)
    assert flops == 2 * 4 * (2048 * 1024 + 16 * 2048 + 16 * 1024)
    assert moved == 2 * (4 * 1024 + 2048 * 1024 + 16 * (2048 + 1024) + 4 * 2048)
    train, _ = lora_impls._work("train", 4, 2048, 1024, 0, 2)
    assert train == 2 * lora_impls._work("fwd", 4, 2048, 1024, 0, 2)[0]


def test_the_list_holds_what_the_bars_name():
    labels = {s.label for s in bench_lora.specs(CPU, full=False)}
    for dtype in ("bf16", "fp32"):
        assert {f"decode 2048->2048 M{m} R16 {dtype}" for m in (1, 4, 8, 16)} <= labels
        fast = dtype == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert f"train 2048->2048 M{1024 if fast else 32} R16 {dtype}" in labels
    full = {(s.k, s.n, s.m) for s in bench_lora.specs(CPU, full=True) if s.kind == "fwd"}
    linears = bench_lora.LLAMA_1B + bench_lora.GPT2
    assert full == {(k, n, m) for k, n in linears for m in range(1, 17)}


def test_command_writes_rows_and_says_what_is_missing(tmp_path, capsys):
    out = tmp_path / "rows.json"
    rows = run_op(
        "lora",
        "cpu",
        out,
        case="decode M1 768->768 fp32",
        impls=["fusedpeft", "unsloth"],
        seconds=0,
    )
    assert json.loads(out.read_text()) == rows
    assert [r["impl"] for r in rows] == ["fusedpeft", "frozen"]
    assert {r["op"] for r in rows} == {"lora_linear"}
    said = capsys.readouterr().out
    assert "unsloth: CUDA only" in said and "ceilings of this run" in said


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"op": "nothing"}, "expected one of lora, .*got 'nothing'"),
        ({"op": "lora", "case": "M99"}, "nothing matches 'M99'"),
        ({"op": "lora", "impls": ["liger"]}, "expected some of .*got liger"),
        ({"op": "lora", "device": "tpu"}, "expected cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_input_is_one_line(kwargs, message):
    with pytest.raises(InputError, match=message) as error:
        run_op(**kwargs)
    assert "\n" not in str(error.value)


def test_module_command_exits_with_2_and_no_traceback():
    command = [sys.executable, "-m", "fusedpeft.bench", "lora", "--case", "M99"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "nothing matches" in done.stderr


@pytest.fixture
def mounted():
    """As `fusedpeft bench …`: the application is one of several."""
    whole = typer.Typer()
    whole.add_typer(app, name="bench")
    whole.command()(lambda: None)
    return lambda *args: CliRunner().invoke(whole, ["bench", *args])


def test_cli(mounted, tmp_path):
    out = tmp_path / "rows.json"
    args = ("--case", "M1 768->768 fp32", "--impl", "fusedpeft", "--seconds", "0")
    assert mounted("lora", *args, "--json", str(out)).exit_code == 0
    assert [r["impl"] for r in json.loads(out.read_text())] == ["fusedpeft", "frozen"]
    assert "kernels/lora.py" in mounted("--ledger").output
    bad = mounted("lora", "--case", "M99")
    assert bad.exit_code == 2 and "nothing matches" in bad.output
    assert mounted("aot", "--arch", "sm_1").exit_code == 2  # its own parser refuses it


def test_cli_reports_a_mismatch(mounted, monkeypatch):
    monkeypatch.setattr(lora_impls, "_fusedpeft", lambda x, s: lora_impls._reference(x, s) * 2)
    wrong = mounted("lora", "--case", "M1 768->768 fp32", "--impl", "fusedpeft")
    assert wrong.exit_code == 1
    assert "mismatch, nothing was timed" in wrong.output and "|got - ref64|" in wrong.output


def test_the_command_line_is_light():
    code = "import fusedpeft.bench.cli, sys; assert 'torch' not in sys.modules, 'imports torch'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
