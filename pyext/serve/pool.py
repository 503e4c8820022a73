"""`AdapterPool`: many adapters on the device at once, each in a slot that never moves.

    pool = fp.AdapterPool.for_model(model, slots=64, max_rank=64)
    pool.load("support", "adapters/support")
    pool.install(model)
    with pool.batch(["support", None]):
        model(input_ids)  # two rows

Which slot is whose is decided in C++ (csrc/pool.h), under one lock and for any number of threads.
A slot that somebody holds is never written: replacing its adapter loads into another slot, and the
old one is wiped by whoever lets go of it last. Everything on the device is allocated once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusedpeft.errors import InputError
from fusedpeft.layers.config import ALL_LINEAR, BottleneckAdapter
from fusedpeft.layers.state import unwrap
from fusedpeft.layers.targets import nearest
from fusedpeft.ops.native import native
from fusedpeft.ops.slots import LoRASlots, lora_slots
from fusedpeft.serve.checkpoint import read_adapter
from fusedpeft.serve.model_places import places_of
from fusedpeft.serve.modules import Serving
from fusedpeft.serve.places import Packed, Places

HOST_BYTES = 4 << 30


class AdapterPool:
    """Slots on the device, each for one adapter of any kinds, and adapters waiting in host memory.

    Made by `for_model`. Safe to use from many threads. On CUDA, copies run on a stream of the
    pool's own; the stream that acquires a slot waits for its bytes, and a slot that was released is
    overwritten after the work that its holder had queued by then.
    """

    def __init__(self, places: Places, device: torch.device, dtype: torch.dtype, host_bytes: int):
        if native is None:
            raise NotImplementedError(
                "AdapterPool: needs fusedpeft._C; build it: pip install -e . (a C++ compiler)"
            )
        self.device, self.dtype, self.host_bytes = device, dtype, host_bytes
        slots = places.slots
        self._places, self._table = places, native.SlotTable(slots)
        self._numbers = torch.zeros(slots, places.numbers, dtype=dtype, device=device)
        self._sizes = torch.full((places.entries,), -1, dtype=torch.int32, device=device)
        self._scales = torch.zeros(places.entries, dtype=torch.float32, device=device)
        # Entries of slot s in the two tables: first + s · step.
        self._first, self._step = torch.tensor(places.tables, device=device).unbind(1)
        self._held = [[0] * len(places.tables)] * slots  # sizes by column of each slot, on the host
        self._views = {
            key: made(self._numbers, self._sizes, self._scales)
            for key, made in places.views.items()
        }
        self._bytes = [0] * slots  # what the adapter in each slot takes of it
        # Copies of the adapters, also of those on the device. Those that wait stand in the order in
        # which they gave their slots up, which is that of their last use.
        self._host: OrderedDict[str, Packed] = OrderedDict()
        self._loading = threading.Lock()  # one load at a time; guards _host
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # has yet to fill all that
        self._written: dict[int, torch.cuda.Event] = {}  # of slots whose bytes may be on their way
        self._serving = Serving(self)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        slots: int = 64,
        max_rank: int = 64,
        *,
        max_prefix: int = 0,
        max_prompt: int = 0,
        bottleneck: BottleneckAdapter | None = None,
        targets: str | Sequence[str] = ALL_LINEAR,
        dtype: torch.dtype | None = None,
        host_bytes: int = HOST_BYTES,
    ) -> AdapterPool:
        """A pool for a Hugging Face model, on its device.

        slots: adapters on the device at once. max_rank: of LoRA, on the linears that `targets`
        names (as in fp.LoRA; every linear but the head). max_prefix, max_prompt: virtual tokens of
        a prefix, of a soft prompt. bottleneck: what its adapters have in common (placement,
        activation, norm) and their largest size. 0, None: none of that kind. dtype: of the
        adapters, the model's or fp32; None: the model's. host_bytes: how much host memory adapters
        may take that wait there when they are not on the device, the least recently used one going
        first; beside it stands a copy of each that is on the device and may have to wait. 0: none.
        `stats()` tells what it all takes. Raises InputError.
        """
        model = unwrap(model)
        limits = {"max_rank": max_rank, "max_prefix": max_prefix, "max_prompt": max_prompt}
        for name, value in {"slots": slots, **limits, "host_bytes": host_bytes}.items():
            least = int(name == "slots")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name}: expected a whole number >= {least}, got {value!r}")
        if bottleneck is not None and not isinstance(bottleneck, BottleneckAdapter):
            kind = type(bottleneck).__name__
            raise InputError(f"bottleneck: expected a BottleneckAdapter or None, got {kind}")
        if not any(limits.values()) and bottleneck is None:
            raise InputError("for_model: expected a size of some kind of adapter, all are 0")
        if not isinstance(model, PreTrainedModel) and (max_prefix or max_prompt or bottleneck):
            raise InputError(
                f"{type(model).__name__}: expected a model of transformers for adapters other than "
                "LoRA"
            )
        if not isinstance(targets, str):
            if not isinstance(targets, Sequence) or not all(isinstance(t, str) for t in targets):
                raise InputError(
                    f"targets: expected 'all-linear', a regular expression or a list of names, got "
                    f"{targets!r}"
                )
            targets = tuple(targets)
        if hasattr(model, "peft_config"):
            raise InputError(
                "for_model: expected a model without PEFT's adapters: give it what "
                "peft_model.unload() returns, and load their folders into the pool"
            )
        if targets == ():
            raise InputError("targets: expected at least one name, got an empty list")
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        if weight is None:
            raise InputError(f"for_model: expected parameters in {type(model).__name__}, got none")
        dtype = weight.dtype if dtype is None else dtype
        if dtype not in (weight.dtype, torch.float32):
            raise InputError(f"dtype: expected {weight.dtype} (the model's) or fp32, got {dtype}")
        sizes = (max_rank, max_prefix, max_prompt, bottleneck)
        return cls(places_of(model, slots, targets, *sizes), weight.device, dtype, host_bytes)

    @staticmethod
    def from_tensors(adapters: Sequence[tuple[Tensor, Tensor, float] | None]) -> LoRASlots:
        """The slots of one linear, what `ops.multi_lora_linear` takes: (a [R, K], b [N, R], scale)
        in slot 0, 1, …; None leaves one free."""
        return lora_slots(adapters)

    # --- loading --------------------------------------------------------------------------------

    def load(self, name: str, dir: str | Path) -> int:
        """Loads a checkpoint of PEFT's, AdapterHub's or `fp.save_adapter` under `name`; returns its
        slot.

        LoRA (rsLoRA, rank and alpha patterns), prefix and prompt tuning, bottleneck adapters of the
        pool's placement, activation and norm; safetensors only. A name
        that is taken is replaced: who holds the old adapter goes on with it. Where no slot is free
        the least recently used adapter that nobody holds gives its slot up and stays in host
        memory. Raises InputError, with a list, for a checkpoint that does not fit, and ValueError
        where every slot is held; the pool is then as it was.
        """
        return self.put(name, read_adapter(Path(dir), self._places))

    def put(self, name: str, tensors: Mapping[str, Tensor | float]) -> int:
        """As `load`, from tensors. Keys are a module's path and one of these names:

        linear: lora_A [R, K], lora_B [N, R], scale (1). Attention: prefix_k, prefix_v [HKV, P, D].
        Input embedding: prompt [P, d]. What a bottleneck adapter follows: down_w [E, d], up_w
        [d, E], down_b [E] and up_b [d] (0), scale (1), norm_w and norm_b [d] where the pool's have
        a norm. All kinds may come together; a place left out is left as it is.
        """
        if not isinstance(name, str) or not name:
            raise InputError(f"adapter name: expected a word, got {name!r}")
        packed = self._places.pack(
            f"adapter {name!r}", tensors, self.dtype, self._stream is not None
        )
        with self._loading:
            slot = self._fill(name, packed, hold=False)
            self._host.pop(name, None)
            if packed.bytes <= self.host_bytes:
                self._host[name] = packed
            self._trim()
        return slot

    def evict(self, name: str) -> None:
        """Forgets an adapter, on the device and in host memory. Who holds it goes on with it; its
        bytes are wiped when the last one lets go. Raises InputError for a name that is not there.
        """
        with self._loading:
            waited = self._host.pop(name, None) is not None
            if self._table.find(name) >= 0:
                self._wipe_and_free(self._table.evict(name))
            elif not waited:
                raise self.unknown(name)

    def _trim(self) -> None:
        """Under self._loading: the first to have given their slots up go."""
        waiting = [n for n in self._host if self._table.find(n) < 0]
        total = sum(self._host[n].bytes for n in waiting)
        for name in waiting:
            if total <= self.host_bytes:
                return
            total -= self._host.pop(name).bytes

    def _fill(self, name: str, packed: Packed, hold: bool) -> int:
        """Under self._loading."""
        slot, evicted = self._table.begin_load(name)
        if evicted in self._host:
            self._host.move_to_end(evicted)
        try:
            with self._copying():
                if evicted:
                    self._wipe(slot)
                self._write(slot, packed)
                self._held[slot], self._bytes[slot] = packed.sizes.tolist(), packed.bytes
                if self._stream is not None:
                    self._written[slot] = self._stream.record_event()
        except BaseException:
            self._wipe_and_free(slot)
            raise
        self._wipe_and_free(self._table.commit(slot, hold))
        return slot

    def _copying(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @torch.no_grad()
    def _write(self, slot: int, packed: Packed) -> None:
        row, entries = self._numbers[slot], self._first + self._step * slot
        for at, first, n in packed.runs:
            row[at : at + n].copy_(packed.flat[first : first + n], non_blocking=True)
        for table, values in ((self._scales, packed.scales), (self._sizes, packed.sizes)):
            # Sizes come last: with them the slot holds an adapter.
            table.index_copy_(0, entries, values.to(self.device, non_blocking=True))

    @torch.no_grad()
    def _wipe(self, slot: int) -> None:
        entries = self._first + self._step * slot
        self._sizes.index_fill_(0, entries, -1)
        self._scales.index_fill_(0, entries, 0.0)
        self._numbers[slot].zero_()

    def _wipe_and_free(self, slot: int) -> None:
        if slot >= 0:
            with self._copying():
                self._wipe(slot)
            self._table.free(slot)

    # --- use ------------------------------------------------------------------------------------

    def acquire(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each name, held until `release`; -1 for None. An adapter that waits in host
        memory is copied to the device first. Raises InputError for a name that is not there and
        ValueError where no slot can be had for one; nothing is held then.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise InputError(f"names: expected a list, one for each row, got {names!r}")
        for name in names:
            if name is not None and not (isinstance(name, str) and name):
                raise InputError(
                    f"names: expected an adapter's name or None, the base alone, got {name!r}"
                )
        asked = [name or "" for name in names]
        slots = self._table.acquire(asked)
        try:
            for i, name in enumerate(asked):
                if slots[i] < 0 and name:
                    slots[i] = self._fetch(name)
        except BaseException:
            self.release(slots)
            raise
        if self._written:
            self._await(slots)
        return slots

    def release(self, slots: Sequence[int]) -> None:
        """Lets go of slots that `acquire` gave. Raises ValueError for one that nobody holds."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        for slot in self._table.release(slots):
            self._wipe_and_free(slot)

    @contextmanager
    def hold(self, names: Sequence[str | None]) -> Iterator[Tensor]:
        """`acquire` and `release` around a block: the slots as an int32 Tensor on the device."""
        slots = self.acquire(names)
        try:
            yield torch.tensor(slots, dtype=torch.int32, device=self.device)
        finally:
            self.release(slots)

    def column(self, kind: str, path: str) -> int:
        """Where `sizes` has that of a place."""
        found = [p for p in self._places.of(kind) if p.path == path]
        if not found:
            known = [p.path for p in self._places.of(kind)]
            raise InputError(f"the pool has no {kind!r} at {path!r}; {nearest(path, known)}")
        return found[0].columns[0]

    def has(self, kind: str) -> bool:
        """Whether there are places for that kind of adapter."""
        return any(k == kind for k, _ in self._views)

    @property
    def bottleneck(self) -> BottleneckAdapter | None:
        """What the pool's bottleneck adapters have in common."""
        return self._places.bottleneck

    def _fetch(self, name: str) -> int:
        with self._loading:
            slot = self._table.acquire([name])[0]  # another thread was first
            if slot >= 0:
                return slot
            if name not in self._host:
                raise self.unknown(name)
            slot = self._fill(name, self._host[name], hold=True)
            self._trim()
            return slot

    def _await(self, slots: list[int]) -> None:
        stream = torch.cuda.current_stream(self.device)
        for slot in set(slots):
            event = self._written.get(slot)
            if event is not None:
                stream.wait_event(event)
                if event.query():
                    self._written.pop(slot, None)

    def unknown(self, name: str) -> InputError:
        """What to raise for a name that is not there; it tells the nearest one that is."""
        known = {n for state, n, _ in self._table.slots() if state == "live"} | self._host.keys()
        return InputError(
            f"no adapter is named {name!r} (or it gave its slot up, and host_bytes had no room for "
            f"it: load it again); {nearest(str(name), known)}"
        )

    # --- looking --------------------------------------------------------------------------------

    def slot(self, name: str) -> int:
        """The slot of an adapter that is on the device now; `acquire` it to keep it there."""
        found = self._table.find(name)
        if found < 0:
            raise self.unknown(name)
        return found

    def __contains__(self, name: str) -> bool:
        return self._table.find(name) >= 0 or name in self._host

    def sizes(self, slot: int) -> list[int]:
        """Of a slot that is held: what its adapter's size is in each column of its places."""
        if not 0 <= slot < len(self._held):
            raise InputError(f"slot: expected 0..{len(self._held) - 1}, got {slot}")
        return self._held[slot]

    def virtual_tokens(self, slot: int) -> tuple[int, int]:
        """Of a slot that is held, -1 for none: the positions that its adapter takes of the model's,
        those of its longest prefix and of its prompt."""
        sizes = None if slot < 0 else self.sizes(slot)

        def most(kind: str) -> int:
            return max((sizes[p.columns[0]] for p in self._places.of(kind) if sizes), default=0)

        return most("prefix"), most("prompt")

    def at(self, *paths: str, kind: str | None = None) -> NamedTuple:
        """What the ops take for a module: LoRASlots of a linear, or of siblings that are stacked
        (q_proj, k_proj, v_proj; gate_proj, up_proj), which share their numbers with those of each
        alone; PrefixSlots of attention; PromptSlots of the input embedding; AdapterSlots of
        attention and MLP. The same tensors for as long as the pool lives.

        kind ("lora", "prefix", "prompt", "bottleneck"): where a module has two. Raises InputError.
        """
        if not paths:
            raise InputError("at: expected the path of a module, got none")
        kinds = [k for k, p in self._views if p == paths and kind in (None, k)]
        if len(kinds) == 1:
            return self._views[kinds[0], paths]
        if kinds:
            raise InputError(f"{paths[0]}: expected kind as one of {', '.join(kinds)}")
        known = {" + ".join(p) for k, p in self._views if kind in (None, k)}
        raise InputError(
            f"the pool has no slots at {' + '.join(paths)!r}; {nearest(paths[-1], known)}"
        )

    def stacked(self) -> list[tuple[str, ...]]:
        """The paths of the linears, those together whose slots are stacked."""
        inside = {p for k, paths in self._views if k == "lora" and len(paths) > 1 for p in paths}
        lora = [paths for k, paths in self._views if k == "lora"]
        return [paths for paths in lora if len(paths) > 1 or paths[0] not in inside]

    def stats(self) -> dict:
        """Slots, bytes and adapters, as plain data.

        slot_bytes and device_bytes are what the tensors take whether used or not; of an adapter,
        bytes is what it takes of its slot. host_bytes is what those take that wait in host memory,
        host_copies_bytes what the copies of those on the device do; of an adapter, its copy.
        """
        with self._loading:
            host = {name: packed.bytes for name, packed in self._host.items()}
        table = self._table.slots()
        states = [state for state, _, _ in table]
        live = {name: (i, holds) for i, (state, name, holds) in enumerate(table) if state == "live"}
        tensors = (self._numbers, self._sizes, self._scales)
        total = sum(t.numel() * t.element_size() for t in tensors)
        return {
            "slots": len(table),
            **{state: states.count(state) for state in ("free", "loading", "live", "retired")},
            "held": sum(holds > 0 for _, _, holds in table),
            "slot_bytes": total // len(table),
            "device_bytes": total,
            "host_bytes": sum(b for name, b in host.items() if name not in live),
            "host_copies_bytes": sum(b for name, b in host.items() if name in live),
            "host_capacity_bytes": self.host_bytes,
            "adapters": {
                name: {"slot": slot, "holds": holds, "host_bytes": host.get(name, 0),
                       "bytes": host[name] if slot is None else self._bytes[slot]}
                for name in sorted(live.keys() | host.keys())
                for slot, holds in [live.get(name, (None, 0))]
            },
        }  # fmt: skip

    # --- a model that runs on the pool ------------------------------------------------------------

    def install(self, model: nn.Module) -> None:
        """Lets the model read the pool, in place: its linears, and what else it has places for."""
        self._serving.install(unwrap(model))

    def uninstall(self) -> None:
        """Makes the model what it was."""
        self._serving.uninstall()

    def batch(
        self, names: Sequence[str | None], *, by_token: bool = False
    ) -> AbstractContextManager:
        """Inside, the installed model computes row i of its batch with the adapter names[i].

        by_token: token i instead, of a batch in which sequences are packed; for LoRA and bottleneck
        adapters. In forward raises ValueError for another number of rows, or of tokens.

        A batch is its thread's, and under asyncio its task's: open it where the model runs. A
        forward elsewhere, without one, raises InputError as long as any is open, and so does
        opening another one inside; do not yield out of one in a generator, unless nothing else runs
        in that thread or task. Gradients are off inside.
        """
        return self._serving.batch(names, by_token)

    def batch_of(self, slots: Sequence[int], *, cached: bool = False) -> AbstractContextManager:
        """As `batch`, with slots that the caller holds (`acquire`), -1 for the base alone: for
        requests that take many steps, and keep the adapter that they began with.

        cached: what soft prompts became lies in the cache already, as if it had been tokens; rows
        that were computed apart may then go on together. The caller says which positions they are
        at, prompts counted.
        """
        return self._serving.batch_of(slots, cached=cached)
