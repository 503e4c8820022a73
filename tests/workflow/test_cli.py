"""The command line: every command's help, one-line errors with exit code 2, answers."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import transformers
from safetensors import SafetensorError

from fusedpeft import cli

COMMANDS = (
    "run", "sft", "reward", "pro", "evaluate", "report", "pretrain", "generate", "bench", "doctor",
)  # fmt: skip


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `fusedpeft ARGS`."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fusedpeft", *map(str, args)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0 and "Usage" in out


def test_a_seed_beyond_numpys(call):
    code, _, err = call("pretrain", "--seed", str(2**32), "text", "out")
    assert code == 2 and "4294967295" in err


def test_help_is_light():
    code = "import fusedpeft.cli, sys; assert 'torch' not in sys.modules, 'imports torch'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_run_and_generate(call, write_config, tmp_path, base):
    path = write_config(reward=None, pro=None)
    code, _, err = call("run", path)
    assert code == 0 and "held-out loss" in err and "report.html" in err
    assert (tmp_path / "run" / "config.yaml").is_file()
    code, _, err = call("sft", path)
    assert code == 0 and "sft: complete, skipped" in err
    adapter, few = tmp_path / "run" / "sft" / "adapter", ("--max-new-tokens", 8)
    transformers.logging.enable_progress_bar()  # as in a process of its own
    code, out, err = call("generate", base, "tell me of the cat 1", *few, "--adapter", adapter)
    assert code == 0 and out.strip() and not err
    assert out != call("generate", base, "tell me of the cat 1", *few)[1]


def truncated(folder, name):
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    return copy


@pytest.mark.parametrize("name", ["a: b", "한글 #1", "[x", "${HOME}", "'"])
def test_the_folder_of_an_evaluation_is_taken_as_it_stands(call, write_config, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    path = write_config(sft=None, reward=None, pro=None, evaluate={"tasks": ["mmlu"]})
    code, _, err = call("evaluate", path, "--data", folder)
    assert code == 2 and err == f"error: evaluate.data: there is no file {folder}/mmlu/dev.jsonl\n"


@pytest.mark.parametrize(
    "error, full",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 4"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Error while deserializing header: HeaderTooLarge"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_full_disk_is_one_line(call, write_config, monkeypatch, error, full):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("fusedpeft.workflow.run.run", fail)
    if full:
        code, _, err = call("run", write_config())
        assert code == 2 and err.count("\n") == 1 and "is the disk full?" in err
    else:
        with pytest.raises(type(error)):
            call("run", write_config())


def test_bad_input_is_one_line_and_writes_nothing(call, write_config, tmp_path, base, data):
    def long_row():
        (data / "long.jsonl").write_text(
            '{"prompt": "a", "completion": "b"}\n{"prompt": "'
            + "tell " * 99
            + '", "completion": "b"}\n'
            '{"prompt": "c", "completion": "d"}\n'
        )
        return {"data": str(data / "long.jsonl")}

    (data / "empty.jsonl").write_text("")
    (data / "fields.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"text": "a"}\n')
    sft = {"data": str(data / "sft.jsonl")}
    cases = [
        ({"sft": {**sft, "learning_rte": 1}}, "unknown key 'learning_rte'.*learning_rate"),
        ({"sft": {"data": "none.jsonl"}}, "there is no file .*none.jsonl"),
        ({"sft": {"data": str(data / "empty.jsonl")}}, "expected rows, the file is empty"),
        ({"sft": {"data": str(data / "fields.jsonl")}}, "row 2: expected 'messages'"),
        ({"sft": long_row()}, "long.jsonl row 2: expected at most 64 tokens"),
        ({"sft": {**sft, "max_length": 65}}, "the model takes at most 64 tokens, got 65"),
        ({"sft": {**sft, "lr_scheduler_type": "wavy"}}, "sft: .*wavy"),
        ({"lora": {"rank": 0}}, "rank: expected a whole number >= 1, got 0"),
        ({"lora": {"targets": ["q_porj"]}}, "no module is named 'q_porj'; did you mean 'q_proj'"),
        ({"base": str(truncated(base, "model.safetensors"))}, "the weights are damaged"),
        ({"base": str(tmp_path)}, "expected a folder with a model's config.json"),
    ]
    import re

    for changes, message in cases:
        code, out, err = call("run", write_config(**changes))
        assert code == 2, (changes, err)
        assert re.search(message, err), err
        assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err
        found = sorted(p.name for p in (tmp_path / "run").glob("*"))
        assert not set(found) & {"sft", "results.json", "report.html"}, (message, found)
    code, _, err = call("run", tmp_path / "none.yaml")
    assert code == 2 and "expected a YAML file, there is none" in err
    code, _, err = call("generate", base, "hi", "--adapter", tmp_path)
    assert code == 2 and "adapter_config.json" in err
    code, _, err = call("generate", tmp_path / "nope", "hi")
    assert code == 2 and "expected a folder with a model and its tokenizer, got" in err
    code, _, err = call("generate", base, "hi \udcff")
    assert code == 2 and r"prompt: expected UTF-8 text, got 'hi \udcff'" in err
    code, _, err = call("pretrain", tmp_path / "p")
    assert code == 2 and "expected --text FILE" in err


def test_an_adapter_of_another_base_and_a_truncated_one(call, write_config, tmp_path, base):
    path = write_config(reward=None, pro=None)
    assert call("run", path)[0] == 0
    adapter = tmp_path / "run" / "sft" / "adapter"
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    code, _, err = call("generate", base, "hi", "--adapter", adapter)
    assert code == 2 and err.count("\n") == 1 and "adapter_model.safetensors" in err
    weights.write_bytes(whole)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    settings = json.loads((other / "config.json").read_text())
    from transformers import LlamaConfig, LlamaForCausalLM

    settings["hidden_size"], settings["head_dim"] = 16, 4
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(other)
    code, _, err = call("generate", other, "hi", "--adapter", adapter)
    assert code == 2 and err.count("\n") == 1 and "does not fit this Llama" in err, err


def test_doctor(call):
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and {"versions", "devices", "extension", "ops"} <= set(found)
    assert {o["op"] for o in found["ops"]} >= {"lora_linear", "pro_loss"}
    code, out, _ = call("doctor")
    assert code == 0 and "lora_linear" in out
