"""What README.md and CONTRIBUTING.md say is so: examples run, paths and commands exist, the table
of measurements is the one that the files give."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from fusedpeft import cli
from fusedpeft.bench import readme
from fusedpeft.serve import wire

ROOT = Path(__file__).resolve().parents[1]
DOCS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")
MODEL = "meta-llama/Llama-3.2-1B"
# Made by running, or patterns: not in a checkout.
NOT_FILES = re.compile(r"^(runs/|\.venv/)|[<>*]|foo|^rows\.json$")
ABSENT = {"tests/__init__.py"}  # named as what must not be there
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    return [body for kind, body in FENCE.findall(text_of(name)) if kind == language]


def commands():
    """Every command line of the documents' shell blocks and inline code."""
    found = []
    for name in DOCS:
        for body in blocks(name, "bash"):
            found += [line.partition("#")[0].strip() for line in body.splitlines()]
        inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(name)))
        found += [code for code in inline if re.match(r"(\S*/)?(fusedpeft|make|python -m) ", code)]
    return sorted({command for command in found if command})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_example(number, tiny):
    """(its names, what it printed)"""
    code = blocks("README.md", "python")[number]
    assert code.count(f'"{MODEL}"') == 1 and len(code.strip().splitlines()) <= 12
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace(MODEL, str(tiny)), "README.md", "exec"), names)
    return names, printed


@pytest.mark.parametrize("number", [0, 1])
def test_an_example_of_the_readme_runs(number, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = run_example(number, tiny)
    model, fp = names["model"], names["fp"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and fp.trainable_parameters(model) == sum(p.numel() for p in trained)
    if number == 0:
        assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        assert f"{fp.trainable_parameters(model):,} trained parameters" in printed.getvalue()
    else:
        kinds = {type(m).__module__ for n, m in model.named_modules() if n.endswith("q_proj")}
        assert all(kind.startswith("fusedpeft") for kind in kinds) and kinds
        assert "14" in printed.getvalue()  # seven linears in each of two layers


def test_the_example_of_many_adapters_runs_on_what_the_first_one_saved(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_example(0, tiny)
    names, printed = run_example(2, tiny)
    assert names["pool"].slot("support") == 0 and names["logits"].shape == (2, 64, 64)
    assert f"{names['pool'].stats()['device_bytes']:,} bytes" in printed.getvalue()


def test_there_are_three_examples():
    assert len(blocks("README.md", "python")) == 3


@pytest.mark.parametrize("name", DOCS)
def test_paths_exist(name):
    text = text_of(name)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    code = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    words = [word for span in code for word in span.split()]
    words += [word for body in blocks(name, "bash") for word in body.split()]
    # A path has a folder in it, or the ending of a file at the root.
    looks = re.compile(r"^\.?[\w-]+(/[\w.<>*-]+)+/?$|^[\w-]+\.(md|txt|toml|in)$")
    # `prompt/completion` is none: it needs a file's ending or a folder that is there.
    folders = {p.name for p in ROOT.iterdir() if p.is_dir()}
    paths = {w for w in words if looks.match(w) and not NOT_FILES.search(w)}
    paths = {w for w in paths if "." in w.split("/")[-1] or w.split("/")[0] in folders}
    assert paths
    assert not [path for path in ABSENT if (ROOT / path).exists()]
    paths -= ABSENT
    missing = [path for path in (*links, *paths) if not (ROOT / path).exists()]
    assert not missing


def test_commands_exist():
    """Each `fusedpeft` command, its options and its files; each make target; each module."""
    root = typer.main.get_command(cli.app)
    targets = set(re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE))
    seen = set()
    for line in commands():
        words = [w for w in shlex.split(line) if not re.fullmatch(r"\w+=\S*", w)]
        program, arguments = words[0].rpartition("/")[2], words[1:]
        seen.add(program)
        if program == "fusedpeft":
            command = root
            while arguments and arguments[0] in getattr(command, "commands", {}):
                command = command.commands[arguments.pop(0)]
            options = {option for p in command.params for option in p.opts}
            assert command is not root, line
            passed_on = command.name == "aot"  # all its arguments go to a module of its own
            unknown = [w for w in arguments if w.startswith("--") and w not in options]
            assert passed_on or not unknown, line
        elif program == "make":
            assert arguments and arguments[0] in targets, line
        elif program.startswith("python"):
            at = arguments.index("-m")
            module = arguments[at + 1]
            package = module.split(".")
            assert module == "pytest" or package[:2] == ["fusedpeft", "bench"], line
            assert module == "pytest" or (ROOT / "bench" / f"{package[2]}.py").is_file(), line
        elif program == "curl":
            said = json.loads(arguments[arguments.index("-d") + 1])
            path = next(w for w in arguments if w.startswith("http://127.0.0.1:8000/"))
            kinds = {"completions": wire.Completion, "chat/completions": wire.Chat}
            kinds[path.partition("/v1/")[2]].model_validate(said)
        elif program == "pip":
            (extra,) = re.findall(r"fusedpeft\[(\w+)\]", arguments[-1])
            assert re.search(rf"^{extra} = \[", text_of("pyproject.toml"), re.MULTILINE), line
        else:
            assert (ROOT / words[0]).is_file(), line
    assert seen >= {"fusedpeft", "make", "python"}


def test_configurations_named_in_commands_load_their_overrides():
    """`--set` of the README names a key that the schema has."""
    from fusedpeft.workflow.config import Config

    found = [w for line in commands() for w in re.findall(r"--set (\S+)=", line)]
    assert found
    for key in found:
        section, name = key.split(".")
        kind = next(
            t for t in Config.model_fields[section].annotation.__args__ if t is not type(None)
        )
        assert name in kind.model_fields, key


def test_public_names_exist():
    import fusedpeft as fp

    text = text_of("README.md") + text_of("CHANGELOG.md")
    names = set(re.findall(r"\bfp\.(\w+)", text)) | {"ops"}
    assert {"attach", "accelerate", "LoRA", "save_adapter"} <= names
    assert not [name for name in names if not hasattr(fp, name)]
    ops = set(re.findall(r"\bops\.(\w+)", text))
    assert "lora_linear" in ops and not [name for name in ops if not hasattr(fp.ops, name)]


def test_the_table_of_the_readme_is_current(capsys):
    assert readme.main(["--root", str(ROOT), "--check"]) == 0, capsys.readouterr().out


def test_the_log_has_its_places():
    headings = re.findall(r"^## (.*)$", text_of("LOG.md"), re.MULTILINE)
    assert len(headings) == len(set(headings)) and {"CPU decode", "Runs"} <= set(headings)
    prediction = text_of("LOG.md").partition("predictions for")[2].partition("\n## ")[0]
    assert "unverified" in prediction


def test_the_predictions_quote_the_committed_table():
    """Registers, shared memory and blocks an SM in LOG.md are those of the committed table."""
    import json

    from fusedpeft.kernels.lora_tables import lora_bwd_config, lora_fwd_config

    rows = json.loads((ROOT / "bench" / "results" / "aot" / "lora.json").read_text())["rows"]
    forward = lora_fwd_config(8192, 4096, 4096, 16, "sm_90")
    backward = lora_bwd_config(8192, 4096, 4096, 16, "sm_90")
    needs = {"NEED_DS": True, "NEED_DB": True, "NEED_DBIAS": False}
    gemm = dict.fromkeys(("HAS_BIAS", "FUSE_S", "DROPOUT", "ACCUMULATE"), False)
    wanted = {
        "shrink": ("shrink", forward["shrink"], {"DROPOUT": False}),
        "GEMM, y": ("gemm", forward["gemm"], gemm),
        "dS and dB": ("dsdb", backward["dsdb"], needs),
        "dA": ("da", backward["da"], {"DROPOUT": False}),
        "GEMM, dx": ("gemm_dx", backward["gemm"], gemm),
    }
    lines = [line.split("|") for line in text_of("LOG.md").splitlines() if line.startswith("| ")]
    for title, (kernel, config, flags) in wanted.items():
        (row,) = (
            r
            for r in rows
            if (r["arch"], r["kernel"], r["elem_bytes"], r["wide_rank"])
            == ("sm_90", kernel, 2, True)
            and r["config"] == config
            and r["flags"] == flags
            and (r["adapter_bytes"] == 2 or kernel == "da")
        )
        (told,) = (line for line in lines if line[1].strip().startswith(title))
        figures = [int(cell) for cell in told[3:6]]
        assert figures == [row["registers"], row["shared_bytes"] // 1024, row["blocks_per_sm"]]


@pytest.mark.parametrize("name", DOCS)
def test_no_path_of_a_machine_and_no_badge(name):
    text = text_of(name)
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", text)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert text.count("![") == len(pictures) and "shields.io" not in text
    assert all((ROOT / picture).is_file() for picture in pictures)  # ours: no badge
