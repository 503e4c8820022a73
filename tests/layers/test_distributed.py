"""DDP and FSDP2 over two ranks of gloo: gradients and files as of one process with all rows."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fusedpeft as fp

WORKER = Path(__file__).parent / "distributed_worker.py"
spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """What two ranks wrote, all methods in one go."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out)], env={**env, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=600)[0] for rank in started]
    finally:
        for rank in started:
            rank.kill()
    assert [rank.returncode for rank in started] == [0, 0], "\n".join(said)[-3000:]
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", worker.CONFIGS)
def test_two_ranks_are_as_one(method, kind, ranks, tmp_path):
    model = worker.build(method)
    want = worker.gradients(model, worker.batch())
    got = load_file(ranks / kind / method / "gradients.safetensors")
    assert got.keys() == want.keys() and len(want) == sum(
        p.requires_grad for p in model.parameters()
    )
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-6, msg=name)
    fp.save_adapter(model, tmp_path)
    for file in tmp_path.iterdir():
        other = ranks / kind / method / file.name
        if file.suffix == ".safetensors":
            mine, theirs = load_file(file), load_file(other)
            assert mine.keys() == theirs.keys()
            for key, tensor in mine.items():
                torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=1e-6, msg=key)
        else:
            assert other.read_bytes() == file.read_bytes()
