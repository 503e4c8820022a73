"""Files that are written whole or not at all, and their digests."""

import signal
import subprocess
import sys

import pytest

from fusedpeft import files
from fusedpeft.files import write_text


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "deep" / "er" / "x.json"
    write_text(path, "하나\n")
    write_text(path, "둘\n")
    assert path.read_text(encoding="utf-8") == "둘\n" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "x.json"
    write_text(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, fails, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from fusedpeft import files
path = Path(sys.argv[1])
files.write_text(path, "old")
getattr(files.os, sys.argv[2])
setattr(files.os, sys.argv[2], lambda *args: os.kill(os.getpid(), signal.SIGKILL))
files.write_text(path, "new" * 100_000)
"""


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path, at):
    path = tmp_path / "x.json"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), at])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "newer")
    assert path.read_text() == "newer"


def test_digest_is_of_the_value_not_of_its_order():
    assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1})
    found = {files.digest(v) for v in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]}, {"a": "1"}, None)}
    assert len(found) == 6


def test_digest_of_a_file_is_of_its_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * 3_000_000)
    two.write_bytes(b"x" * 3_000_000)
    assert files.digest_file(one) == files.digest_file(two)
    two.write_bytes(b"x" * 2_999_999 + b"y")
    assert files.digest_file(one) != files.digest_file(two)


def test_digest_of_a_large_file_is_of_its_size_and_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WHOLE_FILE_BYTES", 100)
    path = tmp_path / "big"

    def of(content):
        path.write_bytes(content)
        return files.digest_file(path)

    whole = of(b"a" * 300)
    assert of(b"a" * 150 + b"b" + b"a" * 149) == whole  # the middle is not read
    assert of(b"b" + b"a" * 299) != whole and of(b"a" * 299 + b"b") != whole
    assert of(b"a" * 249 + b"b" + b"a" * 50) == whole and of(b"a" * 250 + b"b" + b"a" * 49) != whole
    assert of(b"a" * 301) != whole


def test_digest_of_a_model_sees_weights_tokenizer_and_names(tmp_path):
    parts = {"config.json": "{}", "model.safetensors": "w", "tokenizer.model": "t"}
    parts |= {"pytorch_model.bin": "w", "merges.txt": "m", "chat_template.jinja": "c"}
    parts["additional_chat_templates/tools.jinja"] = "c"
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in parts.items():
        (tmp_path / name).write_text(text)
    whole = files.digest_model(tmp_path)
    (tmp_path / "README.md").write_text("says nothing about the model")
    assert files.digest_model(tmp_path) == whole
    for name, text in parts.items():
        (tmp_path / name).write_text("changed")
        assert files.digest_model(tmp_path) != whole, name
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert files.digest_model(tmp_path) != whole
