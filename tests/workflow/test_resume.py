"""Killed at any moment, a run goes on, and ends with the weights of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fusedpeft.workflow.config import load_config
from fusedpeft.workflow.run import run


def weights(folder: Path) -> dict[str, bytes]:
    found = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("*/adapter/*.safetensors")
    }
    assert len(found) == 4  # three adapters and the reward model's heads
    return found


def start(path: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "fusedpeft", "run", str(path), "--set", f"output={out}"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"}, text=True,
    )  # fmt: skip


def test_sigkill(write_config, sections, tmp_path):
    path = write_config(**{s: {**section, "max_steps": 30} for s, section in sections.items()})
    run(load_config(path, [f"output={tmp_path / 'whole'}"]))
    killed = tmp_path / "killed"
    rng = random.Random(0)
    # Once in each stage, at a random moment: before, within or after its first checkpoint.
    for stage in ("sft", "reward", "pro"):
        process = start(path, killed)
        deadline = time.monotonic() + 120
        while not (killed / stage / "config.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "the stage did not start"
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not done yet
    process = start(path, killed)
    _, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    assert weights(killed) == weights(tmp_path / "whole")


def test_a_checkpoint_cut_off_in_the_middle_is_not_used(write_config, tmp_path):
    path = write_config(reward=None, pro=None)
    whole = load_config(path, [f"output={tmp_path / 'whole'}"])
    run(whole)
    run(load_config(path))
    stage = tmp_path / "run" / "sft"
    for name in ("result.json", "history.json"):
        (stage / name).unlink()
    newest = max(stage.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name[11:]))
    (newest / "complete.json").unlink()
    (newest / "trainable.safetensors").write_bytes(b"half")
    run(load_config(path))
    name = "sft/adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert newest.joinpath("complete.json").is_file()  # it was made again, whole
