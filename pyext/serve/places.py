"""Where an adapter lies in its slot.

A slot is one run of numbers of the pool's dtype, the same for every slot, in which each place of
the model that an adapter can act on has its own stretch. So a slot is wiped by one call, an adapter
in host memory is one buffer and a list of copies, and all kinds of adapter are moved alike. Sizes
and scales stand in tensors beside it, a contiguous table for each view that the ops take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fusedpeft.errors import InputError
from fusedpeft.layers.config import BottleneckAdapter
from fusedpeft.ops.slots import AdapterSlots, LoRASlots, PrefixSlots, PromptSlots, row_stride

ALIGN = 64  # numbers: stretches begin at whole 128 bytes in 16 bits


class Packed(NamedTuple):
    """An adapter as the host keeps it: its numbers end to end, and where each run of them goes."""

    flat: Tensor  # [n] of the pool's dtype, pinned where the pool is on a GPU
    runs: list[tuple[int, int, int]]  # (first number in the slot, first in flat, how many)
    sizes: Tensor  # [columns] int32
    scales: Tensor  # [columns] fp32

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.flat, self.sizes, self.scales))


class Run(NamedTuple):
    at: int
    values: Tensor


class Field(NamedTuple):
    """One tensor of an adapter: its shape as the place expects it, "R" standing for any size."""

    shape: tuple[int | str, ...]
    required: bool = True


@dataclass
class Place:
    """One place of the model that one kind of adapter acts on.

    fields: what an adapter brings, by the name that ends its key in `AdapterPool.put`. pack: the
    runs of numbers it becomes. columns: of the sizes and scales that are its own.
    """

    kind: str
    path: str
    most: int  # the largest R
    fields: dict[str, Field]
    pack: Callable[[Mapping[str, Tensor]], list[Run]]
    columns: list[int] = field(default_factory=list)

    def problems(self, given: Mapping[str, Tensor]) -> list[str]:
        """What is wrong with these tensors; size R is that of the first field that has it."""
        said, size = [], None
        for name, wanted in self.fields.items():
            key = f"{self.path}.{name}"
            if name not in given:
                said += [f"{key} is missing"] if wanted.required else []
                continue
            value, shape = given[name], tuple(size if d == "R" else d for d in wanted.shape)
            if len(value.shape) == len(shape):
                shape = tuple(
                    g if d is None else d for d, g in zip(shape, value.shape, strict=True)
                )
            if not value.is_floating_point():
                said.append(f"{key} is {value.dtype}, expected floating numbers")
            elif tuple(value.shape) != shape:
                wanted_shape = tuple("R" if d is None else d for d in shape)
                said.append(f"{key} is {tuple(value.shape)}, expected {wanted_shape}")
            elif size is None and "R" in wanted.shape:
                size = value.shape[wanted.shape.index("R")]
                if not 1 <= size <= self.most:
                    said.append(f"{key} is of size {size}, expected 1..{self.most}")
        return said

    def size(self, given: Mapping[str, Tensor]) -> int:
        name, wanted = next((n, f) for n, f in self.fields.items() if "R" in f.shape)
        return given[name].shape[wanted.shape.index("R")]


def _padded(b: Tensor) -> Tensor:
    """[N, R] with rows of row_stride(R), zeros behind, as one run."""
    n, r = b.shape
    return torch.cat((b, b.new_zeros(n, row_stride(r) - r)), 1).flatten()


class Places:
    """All places of a model: how long a slot is, and how an adapter's tensors become a slot."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.numbers = 0  # of a slot
        self.entries = 0  # of the tables of sizes and of scales
        self.by_field: dict[tuple[str, str], Place] = {}
        self.tables: list[tuple[int, int]] = []  # of each column: its first entry, the step a slot
        # (kind, paths) -> the view, given the numbers [slots, numbers] and the two tables
        self.views: dict[tuple[str, tuple[str, ...]], Callable[..., NamedTuple]] = {}
        self.bottleneck: BottleneckAdapter | None = None  # what all of them have in common
        self.hub: dict[str, str] = {}  # AdapterHub's path of a place -> the path here

    def of(self, kind: str) -> list[Place]:
        """The places of one kind, in the model's order."""
        return list({p.path: p for p in self.by_field.values() if p.kind == kind}.values())

    def _take(self, numbers: int) -> int:
        at, self.numbers = self.numbers, self.numbers + -(-numbers // ALIGN) * ALIGN
        return at

    def _table(self, columns: int) -> tuple[int, list[int]]:
        """(first entry, columns) of a new contiguous table [slots, columns]."""
        first, known = self.entries, len(self.tables)
        self.entries += self.slots * columns
        self.tables += [(first + i, columns) for i in range(columns)]
        return first, list(range(known, known + columns))

    def _add(self, place: Place) -> None:
        self.by_field |= {(place.path, name): place for name in place.fields}

    def _in_table(self, table: Tensor, first: int, columns: int) -> Tensor:
        return table[first : first + self.slots * columns].view(self.slots, columns)

    def add_lora(self, paths: tuple[str, ...], sizes: tuple[int, ...], k: int, most: int) -> None:
        """LoRA on linears [N_i, K] that are stacked; each alone has a view of the same numbers."""
        rank = row_stride(most)
        a, b = self._take(len(paths) * rank * k), self._take(sum(sizes) * rank)
        first, columns = self._table(len(paths))

        def view(at_a: int, at_b: int, first: int, sizes: tuple[int, ...]):
            parts, n = len(sizes), sum(sizes)

            def made(numbers: Tensor, size: Tensor, scale: Tensor) -> LoRASlots:
                return LoRASlots(
                    numbers[:, at_a : at_a + parts * rank * k].unflatten(1, (parts * rank, k)),
                    numbers[:, at_b : at_b + n * rank],
                    self._in_table(size, first, parts),
                    self._in_table(scale, first, parts),
                    sizes,
                )

            return made

        self.views["lora", paths] = view(a, b, first, sizes)
        for i, (path, n) in enumerate(zip(paths, sizes, strict=True)):
            at_a, at_b = a + i * rank * k, b + sum(sizes[:i]) * rank
            own = [columns[i]]
            if len(paths) > 1:
                alone, more = self._table(1)
                self.views["lora", (path,)] = view(at_a, at_b, alone, (n,))
                own += more

            def pack(given: Mapping[str, Tensor], at_a=at_a, at_b=at_b) -> list[Run]:
                return [Run(at_a, given["lora_A"].flatten()), Run(at_b, _padded(given["lora_B"]))]

            fields = {
                "lora_A": Field(("R", k)),
                "lora_B": Field((n, "R")),
                "scale": Field((), required=False),
            }
            self._add(Place("lora", path, most, fields, pack, own))

    def add_prefix(self, path: str, heads: int, dim: int, most: int) -> None:
        starts = [self._take(heads * most * dim) for _ in "kv"]
        first, columns = self._table(1)

        def made(numbers: Tensor, size: Tensor, _scale: Tensor) -> PrefixSlots:
            k, v = (
                numbers[:, at : at + heads * most * dim].unflatten(1, (heads, most, dim))
                for at in starts
            )
            return PrefixSlots(k, v, size[first : first + self.slots])

        def pack(given: Mapping[str, Tensor]) -> list[Run]:
            names = zip(("prefix_k", "prefix_v"), starts, strict=True)
            return [
                Run(at + head * most * dim, rows.flatten())
                for name, at in names
                for head, rows in enumerate(given[name])
            ]

        self.views["prefix", (path,)] = made
        fields = {name: Field((heads, "R", dim)) for name in ("prefix_k", "prefix_v")}
        self._add(Place("prefix", path, most, fields, pack, columns))

    def add_prompt(self, path: str, d: int, most: int) -> None:
        at = self._take(most * d)
        first, columns = self._table(1)

        def made(numbers: Tensor, size: Tensor, _scale: Tensor) -> PromptSlots:
            prompt = numbers[:, at : at + most * d].unflatten(1, (most, d))
            return PromptSlots(prompt, size[first : first + self.slots])

        def pack(given: Mapping[str, Tensor]) -> list[Run]:
            return [Run(at, given["prompt"].flatten())]

        self.views["prompt", (path,)] = made
        self._add(Place("prompt", path, most, {"prompt": Field(("R", d))}, pack, columns))

    def add_bottleneck(self, path: str, d: int, most: int, norms: tuple[str, ...] = ()) -> None:
        """norms: which of norm_w and norm_b adapters bring."""
        size = row_stride(most)
        down, down_b, up, up_b = (self._take(n) for n in (size * d, size, d * size, d))
        at_norms = {name: self._take(d) for name in norms}
        first, columns = self._table(1)

        def made(numbers: Tensor, sizes: Tensor, scales: Tensor) -> AdapterSlots:
            entries = slice(first, first + self.slots)
            return AdapterSlots(
                numbers[:, down : down + size * d].unflatten(1, (size, d)),
                numbers[:, down_b : down_b + size],
                numbers[:, up : up + d * size],
                numbers[:, up_b : up_b + d],
                sizes[entries],
                scales[entries],
                *(numbers[:, at : at + d] for at in at_norms.values()),
            )

        def pack(given: Mapping[str, Tensor]) -> list[Run]:
            runs = [Run(down, given["down_w"].flatten()), Run(up, _padded(given["up_w"]))]
            vectors = {"down_b": down_b, "up_b": up_b, **at_norms}
            return runs + [Run(at, given[name]) for name, at in vectors.items() if name in given]

        self.views["bottleneck", (path,)] = made
        fields = {
            "down_w": Field(("R", d)),
            "up_w": Field((d, "R")),
            "down_b": Field(("R",), required=False),
            "up_b": Field((d,), required=False),
            "scale": Field((), required=False),
        } | {name: Field((d,)) for name in norms}
        self._add(Place("bottleneck", path, most, fields, pack, columns))

    def pack(
        self, what: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, pin: bool
    ) -> Packed:
        """Checks an adapter and lays it out. Raises InputError with all that does not fit."""
        if not isinstance(tensors, Mapping):
            raise InputError(f"{what}: expected tensors by key, got {type(tensors).__name__}")
        by_place: dict[int, tuple[Place, dict[str, Tensor]]] = {}
        unknown = []
        for key, value in tensors.items():
            path, _, name = str(key).rpartition(".")
            place = self.by_field.get((path, name))
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = torch.tensor(float(value))
            if place is None:
                unknown.append(f"{key} has no place in the pool")
            elif not isinstance(value, Tensor):
                unknown.append(f"{key} is {type(value).__name__}, expected a tensor")
            elif value.is_meta or value.layout != torch.strided:
                kind = "meta" if value.is_meta else value.layout
                unknown.append(f"{key} is {kind}, expected a dense tensor with values")
            else:
                by_place.setdefault(id(place), (place, {}))[1][name] = value
        said = unknown + [s for place, given in by_place.values() for s in place.problems(given)]
        if said or not by_place:
            more = f"; and {len(said) - 8} more" if len(said) > 8 else ""
            raise InputError(
                f"{what} does not fit: {'; '.join(said[:8]) or 'it has no tensors'}{more}"
            )
        sizes = torch.zeros(len(self.tables), dtype=torch.int32)
        scales = torch.zeros(len(self.tables), dtype=torch.float32)
        runs: list[Run] = []
        for place, given in by_place.values():
            sizes[place.columns] = place.size(given)
            scales[place.columns] = float(given.get("scale", 1.0))
            runs += place.pack({n: v.detach().to("cpu", dtype) for n, v in given.items()})
        return _packed(sorted(runs, key=lambda r: r.at), sizes, scales, pin)


def _packed(runs: list[Run], sizes: Tensor, scales: Tensor, pin: bool) -> Packed:
    flat = torch.cat([r.values for r in runs])
    copies: list[tuple[int, int, int]] = []
    source = 0
    for at, values in runs:
        n = values.numel()
        if copies and copies[-1][0] + copies[-1][2] == at:  # goes on where the last one ends
            copies[-1] = (*copies[-1][:2], copies[-1][2] + n)
        else:
            copies.append((at, source, n))
        source += n
    if pin:
        flat, sizes, scales = (t.pin_memory() for t in (flat, sizes, scales))
    return Packed(flat, copies, sizes, scales)
