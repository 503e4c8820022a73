"""`fusedpeft serve`: a base model and a folder of adapters behind one address."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fusedpeft.errors import InputError
from fusedpeft.layers.config import BottleneckAdapter, LoRA, PrefixTuning, PromptTuning
from fusedpeft.layers.peft_config import CONFIG_NAME, read_config
from fusedpeft.serve.pool import AdapterPool
from fusedpeft.train.chat import encode_prompt, max_positions
from fusedpeft.workflow.models import load_base, load_tokenizer, quiet

KEY = "FUSEDPEFT_API_KEY"  # the environment variable with the clients' key


def serve(
    base: Path,
    adapters: Path | None,
    *,
    host: str,
    port: int,
    slots: int,
    max_rank: int | None,
    max_batch: int,
    max_waiting: int,
) -> None:
    """Until it is stopped. adapters: each folder in it is one adapter, named as it is. max_rank:
    room for LoRA, None for that of the largest adapter there; the other kinds have the room that
    those there take. Raises InputError."""
    try:
        import uvicorn

        from fusedpeft.serve.http import create_app
    except ModuleNotFoundError as error:
        raise InputError(
            f"serve: expected {error.name}, it is not installed: pip install 'fusedpeft[serve]'"
        ) from error
    from fusedpeft.serve.engine import Engine

    quiet()
    folders = {} if adapters is None else folders_in(adapters)
    listening = _listen(host, port)  # before anything is loaded for nothing
    with listening, Console(stderr=True).status("Loading the model") as status:
        tokenizer, model = load_tokenizer(base), load_base(base).requires_grad_(False)
        name = base.resolve().name
        if name in folders:
            raise InputError(f"{folders[name]}: expected another name than the base's")
        pool = pool_for(model, folders.values(), slots, max_rank)
        for adapter, folder in folders.items():
            status.update(f"Loading {adapter}")
            pool.load(adapter, folder)
        pool.install(model)
        engine = Engine(
            model, tokenizer, pool, context=max_positions(model.config), max_batch=max_batch,
            max_waiting=max_waiting,
        )  # fmt: skip
        one_at_a_time = threading.Lock()  # a tokenizer is for one thread

        def encode(said: str | Sequence[dict[str, str]]) -> list[int]:
            with one_at_a_time:
                if isinstance(said, str):
                    return tokenizer(said)["input_ids"]
                return encode_prompt(tokenizer, said)

        key = os.environ.get(KEY) or None
        app = create_app(engine, name, encode, adapters=adapters, key=key)
        status.stop()
        shown = f"[{host}]" if ":" in host else host
        print(
            f"{name} and {len(folders)} adapters on http://{shown}:{listening.getsockname()[1]}",
            flush=True,
        )
        if key is None and not _is_local(host):
            Console(stderr=True).print(f"anyone who reaches {host} may ask: no {KEY} is set")
        for one in (signal.SIGINT, signal.SIGTERM):  # what uvicorn raises again once it has ended
            signal.signal(one, lambda *_: None)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listening])


def folders_in(adapters: Path) -> dict[str, Path]:
    """{name: folder} of the adapters in a folder."""
    if not adapters.is_dir():
        raise InputError(f"--adapters: expected a folder of adapters' folders, got {adapters}")
    found = {p.name: p for p in sorted(adapters.iterdir()) if (p / CONFIG_NAME).is_file()}
    if not found and (adapters / CONFIG_NAME).is_file():
        raise InputError(f"--adapters: expected the folder around {adapters}, which is an adapter")
    return found


def pool_for(model, folders: Iterable[Path], slots: int, max_rank: int | None) -> AdapterPool:
    """A pool with room for the adapters in `folders`, of whatever kinds they are."""
    ranks, prefixes, prompts, bottleneck = [], [], [], None
    for folder in folders:
        config, _ = read_config(folder)
        if isinstance(config, LoRA):
            ranks += [config.rank, *config.rank_pattern.values()]
        elif isinstance(config, PrefixTuning):
            prefixes.append(config.length)
        elif isinstance(config, PromptTuning):
            prompts.append(config.length)
        elif isinstance(config, BottleneckAdapter):
            size = config.size if bottleneck is None else max(config.size, bottleneck.size)
            bottleneck = replace(bottleneck or config, size=size)  # what else differs, load refuses
    if max_rank is None:
        max_rank = max(ranks, default=64)
    return AdapterPool.for_model(
        model, slots, max_rank, max_prefix=max(prefixes, default=0),
        max_prompt=max(prompts, default=0), bottleneck=bottleneck,
    )  # fmt: skip


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise InputError(
            f"{host}:{port}: expected an address to listen on ({error}); --port 0 takes a free one"
        ) from error


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
