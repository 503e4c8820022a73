"""`fusedpeft bench`: a typer application over the same functions as `python -m fusedpeft.bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fusedpeft.bench import __main__ as plain
from fusedpeft.bench.errors import BenchMismatch
from fusedpeft.errors import InputError

app = typer.Typer(
    help="Time the ops against their peers; list which kernels a GPU has verified.",
    invoke_without_command=True,
    no_args_is_help=True,
)


def main(
    op: str,
    device: str = "cpu",
    json: Path | None = None,
    *,
    full: bool = False,
    case: str | None = None,
    impls: list[str] | None = None,
    seconds: float = 1.0,
    budget: float | None = None,
    warm: bool = False,
    save: bool = False,
) -> list[dict]:
    """Bench one op: see `fusedpeft.bench.run.run_op`."""
    from fusedpeft.bench.run import run_op

    return run_op(
        op,
        device,
        json,
        full=full,
        case=case,
        impls=impls,
        seconds=seconds,
        budget=budget,
        warm=warm,
        save=save,
    )


@app.callback()
def bench(
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Which kernel passed on which GPU, and its figures.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(help="Source checkout that the ledger reads.")
    ] = None,
) -> None:
    if ledger:
        _exit(plain.run_ledger, root)


def _add(op: str, what: str) -> None:
    """The command `bench OP`; every op takes the same options."""

    def command(
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
        full: Annotated[bool, typer.Option("--full", help="Every shape, not a slice.")] = False,
        case: Annotated[
            str | None, typer.Option(help="Only cases with these words, e.g. 'decode M4 bf16'.")
        ] = None,
        impl: Annotated[
            list[str] | None, typer.Option(help="Only this contestant (repeatable) and the floor.")
        ] = None,
        seconds: Annotated[float, typer.Option(help="Of timed rounds a case.")] = 1.0,
        budget: Annotated[
            float | None, typer.Option(help="Start no case after so many seconds.")
        ] = None,
        warm: Annotated[
            bool, typer.Option("--warm", help="Leave the weights in the cache.")
        ] = False,
        save: Annotated[
            bool, typer.Option("--save", help="Write to bench/results/<device>/, to be committed.")
        ] = False,
    ) -> None:
        _exit(
            lambda: main(
                op,
                device,
                json,
                full=full,
                case=case,
                impls=impl,
                seconds=seconds,
                budget=budget,
                warm=warm,
                save=save,
            )
        )

    app.command(op, help=what)(command)


for _op, _what in (
    ("lora", "ops.lora_linear against plain torch, torch.compile, PEFT and the frozen linear."),
    ("lora_multi", "ops.lora_linear_multi against lora_linear for each and the frozen linears."),
    ("lora_quantised", "ops.lora_linear over NF4 and FP8 against dequantising W in each call."),
    ("adapter", "ops.bottleneck_adapter against the eager form and torch.compile."),
    ("adapter_decode", "ops.multi_bottleneck_adapter against plain torch; a decode step with it."),
    ("prefix_attention", "ops.prefix_attention against concatenation with SDPA and two merged."),
    ("prefix_decode", "A few queries over shared prefixes against concatenation with SDPA."),
    ("linear_logprob", "ops.linear_logprob against eager log_softmax, torch.compile and peers."),
    ("multi_lora", "ops.multi_lora_linear against PEFT's mixed batch and the frozen linear."),
    ("soft_prompt", "ops.soft_prompt_embedding against concatenation and torch.compile."),
    ("multi_lora_model", "A whole model in decode, each request with an adapter of its own."),
    ("methods", "Whole models with each method on them against PEFT, modules and the bare model."),
    ("pro_step", "A whole step of PRO on a LoRA model against PEFT with the eager loss."),
):
    _add(_op, _what)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def aot(ctx: typer.Context) -> None:
    """Compile every Triton configuration without a GPU; all arguments go to fusedpeft.bench.aot."""
    _exit(plain.run_aot, ctx.args)


def _exit(run, *args) -> None:
    """Bad input: one line and 2. A wrong result: its figures and 1. Else what `run` returns."""
    try:
        code = run(*args)
    except InputError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    except BenchMismatch as error:
        print(f"mismatch, nothing was timed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(code if isinstance(code, int) else 0)
