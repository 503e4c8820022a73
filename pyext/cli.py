"""The command line. Everything heavy is imported inside the commands: `--help` must be quick."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fusedpeft.bench.cli import app as bench
from fusedpeft.errors import InputError

HELP = "Parameter-efficient fine-tuning at the cost of the frozen model."


app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="CONFIG.yaml")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: sft.max_steps=10."),
]
Shorten = Annotated[
    int | None,
    typer.Option(metavar="N", help="At most N steps a stage, few rows measured; into NAME-short."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Throw away what these stages have and start again.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]  # numpy's range


@app.command()
def run(
    config: ConfigFile,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only this stage (repeatable).", metavar="STAGE")
    ] = None,
    set: Set = None,
    shorten: Shorten = None,
    fresh: Fresh = False,
) -> None:
    """The whole workflow. Skips what is complete, resumes what is not."""
    _run(config, stage, set, shorten, fresh)


@app.command()
def sft(config: ConfigFile, set: Set = None, shorten: Shorten = None, fresh: Fresh = False) -> None:
    """Supervised fine-tuning of a LoRA adapter."""
    _run(config, ["sft"], set, shorten, fresh)


@app.command()
def reward(
    config: ConfigFile, set: Set = None, shorten: Shorten = None, fresh: Fresh = False
) -> None:
    """Reward model with a helpfulness and a safety head, from the SFT adapter."""
    _run(config, ["reward"], set, shorten, fresh)


@app.command()
def pro(config: ConfigFile, set: Set = None, shorten: Shorten = None, fresh: Fresh = False) -> None:
    """Preference ranking optimisation, from the SFT adapter."""
    _run(config, ["pro"], set, shorten, fresh)


@app.command()
def evaluate(
    config: ConfigFile,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with the tasks' files.")
    ] = None,
    set: Set = None,
    shorten: Shorten = None,
    fresh: Fresh = False,
) -> None:
    """Benchmark tasks and held-out loss of the base, after SFT and after PRO."""
    _run(config, ["evaluate"], set, shorten, fresh, data.resolve() if data else None)


@app.command()
def report(
    config: ConfigFile, set: Set = None, shorten: Shorten = None, fresh: Fresh = False
) -> None:
    """Sample answers side by side, results.json and report.html, once all else is complete."""
    _run(config, ["report"], set, shorten, fresh)


def _run(
    config: Path,
    stages: list[str] | None,
    overrides: list[str] | None,
    shorten: int | None,
    fresh: bool,
    data: Path | None = None,
) -> None:
    from fusedpeft.workflow.config import load_config

    resolved = load_config(config, overrides or (), shorten, data)
    from fusedpeft.workflow.run import run as run_workflow

    run_workflow(resolved, stages, fresh=fresh)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="Folder of the model to be made.", metavar="OUT")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, a document a line (repeatable).", metavar="FILE"),
    ] = None,
    quickstart: Annotated[
        bool,
        typer.Option("--quickstart", help="Make OUT/data and OUT/base of the quickstart anew."),
    ] = False,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    block_tokens: Annotated[int, typer.Option(min=2)] = 128,
    learning_rate: float = 3e-3,
    seed: Seed = 0,
) -> None:
    """A tiny Llama and its tokenizer from nothing but text. Goes on where it was cut off."""
    from fusedpeft.train import pretrain as recipe

    if quickstart:
        made = recipe.remake_quickstart(out, seed=seed)
    elif text:
        made = recipe.pretrain(
            text,
            out,
            steps=steps,
            batch_size=batch_size,
            block_tokens=block_tokens,
            learning_rate=learning_rate,
            seed=seed,
        )
    else:
        raise InputError("pretrain: expected --text FILE (or --quickstart), got neither")
    typer.echo(
        f"held-out loss {made['eval_loss_before']:.3f} → {made['eval_loss_after']:.3f} nats a token"
    )


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter for it, PEFT's format.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without a chat turn.")
    ] = False,
) -> None:
    """Answer one prompt greedily."""
    from fusedpeft.workflow.generate import generate_one

    typer.echo(generate_one(model, prompt, adapter, max_new_tokens, raw))


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Each folder in it is an adapter, of any kind, to load."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Adapters on the device at once.")] = 32,
    max_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Room for LoRA loaded later; else the largest rank in DIR."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that decode together.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
) -> None:
    """A model and many adapters behind OpenAI's API. FUSEDPEFT_API_KEY: the key to ask with."""
    from fusedpeft.workflow.serving import serve as run_server

    run_server(
        model,
        adapters,
        host=host,
        port=port,
        slots=slots,
        max_rank=max_rank,
        max_batch=max_batch,
        max_waiting=max_waiting,
    )


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    task: Annotated[str, typer.Option(help="nsmc (sentiment) or e2e (facts into a sentence).")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="The task's rows, .gz or not.")],
    out: Annotated[Path, typer.Option(metavar="DIR")] = Path("runs/compare"),
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text the base was trained on: what is forgotten."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method (repeatable).", metavar="NAME")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    seed: Seed = 0,
) -> None:
    """Seven ways to adapt a model, measured side by side. Goes on where it was cut off."""
    from fusedpeft.evaluate.compare import Settings
    from fusedpeft.evaluate.compare import compare as measure

    settings = Settings(
        base=str(base.resolve()),
        task=task,
        data=str(data.resolve()),
        text=str(text.resolve()) if text else None,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    measure(settings, out, method)
    typer.echo(f"Open {out / 'compare.html'}")


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What is installed, what was built, and which implementation each op takes here and why."""
    from fusedpeft.doctor import doctor as show

    show(json=json)


def main() -> None:
    """Bad input and a full disk: one line on stderr and exit code 2, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except Exception as error:
        if not isinstance(error, InputError) and not _disk_is_full(error):
            raise
        line = " ".join(str(error).split())
        if not isinstance(error, InputError):
            line = f"a file could not be written, is the disk full? ({line}): make room, run again"
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def _disk_is_full(error: Exception) -> bool:
    """By number where Python wrote, by text where safetensors or torch.save did."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    name, text = type(error).__name__, str(error)
    if name == "SafetensorError":
        return f"(os error {errno.ENOSPC})" in text or f"(os error {errno.EDQUOT})" in text
    # torch.save stops at a file that is shorter than what it wrote, and does not say why.
    return isinstance(error, RuntimeError) and (
        "PytorchStreamWriter failed writing" in text or "unexpected pos" in text
    )
