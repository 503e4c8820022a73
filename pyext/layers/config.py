"""What an adapter is: its settings, checked when they are written down, not when they are used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedpeft.errors import InputError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRA:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ, scale = alpha / rank (rslora: alpha / √rank).

    rank: R ≥ 1. dropout: of the adapter's input, in training only, 0 ≤ p < 1.
    targets: "all-linear" (every linear but the output head), a list of module names ("q_proj": the
    end of the path, whole components), or a string: a regular expression for the whole path.
    rslora: Kalajdzievski 2023. dora: Liu et al. 2024, y = (m / ‖W + scale·BA‖) · (…) + bias with
    one trained magnitude m per output; dropout stays on the adapter's path (PEFT drops W's input
    too where the magnitude acts, which is why the two differ under DoRA with dropout). The norm is
    kept until a parameter is written; after a write through `.data` on a GPU, which nothing tells,
    call fusedpeft.ops.lora_dora.forget_norms().
    rank_pattern, alpha_pattern: {regular expression for the end of a path: value}, as in PEFT.

    Adapters are fp32 beside a 16-bit base, else of the base's dtype (PEFT's default);
    `model.to(torch.bfloat16)` after `attach` makes them 16-bit too.
    Raises InputError for a value out of range.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise InputError(f"LoRA dropout: expected 0 <= p < 1, got {self.dropout!r}")
        for name in ("rslora", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(
                    f"LoRA {name}: expected true or false, got {getattr(self, name)!r}"
                )
        object.__setattr__(self, "targets", _check_targets(self.targets))
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise InputError(f"LoRA {name}: expected {{pattern: value}}, got {pattern!r}")
            for key, value in pattern.items():
                _check_regex(name, key)
                check(f"{name}[{key!r}]", value)
            object.__setattr__(self, name, dict(pattern))

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """(R, scale) of the module at `path`, with the patterns applied."""
        rank = _by_pattern(self.rank_pattern, path, self.rank)
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(pattern: Mapping, path: str, default):
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", path)), default)


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _check_rank(name: str, value: object) -> None:
    _check_count(f"LoRA {name}", value)


def _check_alpha(name: str, value: object) -> None:
    if not _is_number(value) or value == 0:
        raise InputError(f"LoRA {name}: expected a number other than 0, got {value!r}")


def _check_regex(name: str, value: object) -> None:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise InputError(
            f"LoRA {name}: expected a regular expression, got {value!r} ({error})"
        ) from error


def _check_targets(targets: object) -> str | tuple[str, ...]:
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return ALL_LINEAR
        _check_regex("targets", targets)
        return targets
    wanted = 'expected "all-linear", a list of module names or a regular expression'
    if not isinstance(targets, (list, tuple, set, frozenset)) or not targets:
        raise InputError(f"LoRA targets: {wanted}, got {targets!r}")
    if not all(isinstance(t, str) and t for t in targets):
        raise InputError(f"LoRA targets: {wanted}, got {targets!r}")
    return tuple(sorted(targets) if isinstance(targets, (set, frozenset)) else targets)


@dataclass(frozen=True)
class BottleneckAdapter:
    """A(x) = scale · (act(norm(x) Dᵀ + c) Uᵀ + e), D [size, d], beside attention and FFN.

    placement: "houlsby" (after both), "pfeiffer" (after the FFN and its residual) or "parallel" (to
    the FFN), as AdapterHub defines them: layers/bottleneck.py has the equations. activation: relu,
    gelu, gelu_tanh, silu, tanh, leaky_relu. norm: None, "layer_norm" or "rms_norm", the adapter's
    own. dropout: of its output, in training only. Raises InputError for a value out of range.
    """

    size: int = 64
    placement: str = "houlsby"
    activation: str = "relu"
    scale: float = 1.0
    norm: str | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_count("BottleneckAdapter size", self.size)
        for name, allowed in (
            ("placement", ("houlsby", "pfeiffer", "parallel")),
            ("activation", ("relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu")),
            ("norm", (None, "layer_norm", "rms_norm")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"BottleneckAdapter {name}: expected one of "
                    f"{', '.join(map(str, allowed))}, got {getattr(self, name)!r}"
                )
        if not _is_number(self.scale) or self.scale == 0:
            raise InputError(
                f"BottleneckAdapter scale: expected a number other than 0, got {self.scale!r}"
            )
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise InputError(
                f"BottleneckAdapter dropout: expected 0 <= p < 1, got {self.dropout!r}"
            )


@dataclass(frozen=True)
class PrefixTuning:
    """Keys and values that every query of every layer sees, `length` of them (Li and Liang 2021).

    length: P ≥ 1, at positions 0 … P − 1; the tokens' own positions start at P, as in PEFT.
    projection: None trains keys and values directly; a width trains P embeddings and an MLP,
    Linear(hidden, width), tanh, Linear(width, 2 · layers · HKV · D), whose output they are; saving
    folds it away. Raises InputError for a value out of range.
    """

    length: int = 32
    projection: int | None = None

    def __post_init__(self) -> None:
        _check_count("PrefixTuning length", self.length)
        if self.projection is not None:
            _check_count("PrefixTuning projection", self.projection)


@dataclass(frozen=True)
class PromptTuning:
    """Embeddings that stand before those of the tokens, `length` of them (Lester et al. 2021).

    init: "random" (normal, with the spread of the model's own embeddings), "vocab" (those of random
    tokens) or "text" (those of `init_text`, repeated or cut to `length`). tokenizer: for "text", a
    tokenizer of transformers or a folder that holds one. Raises InputError for a value out of
    range.
    """

    length: int = 20
    init: str = "random"
    init_text: str | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        _check_count("PromptTuning length", self.length)
        if self.init not in ("random", "vocab", "text"):
            raise InputError(
                f'PromptTuning init: expected "random", "vocab" or "text", got {self.init!r}'
            )
        if (self.init == "text") != (self.init_text is not None):
            raise InputError(
                f'PromptTuning init_text: expected a text with init="text" and none otherwise, got '
                f"{self.init_text!r} with init={self.init!r}"
            )
        if self.init == "text" and self.tokenizer is None:
            raise InputError(
                'PromptTuning tokenizer: expected one, or its folder, with init="text", got None'
            )


@dataclass(frozen=True)
class FeatureBased:
    """A new classifier over what the frozen model puts out; the rest of its head trains with it.

    num_labels: ≥ 1. For classification models. Raises InputError for a value out of range.
    """

    num_labels: int

    def __post_init__(self) -> None:
        _check_count("FeatureBased num_labels", self.num_labels)


@dataclass(frozen=True)
class OutputLayer:
    """The model's own head (classifier or output embeddings) trains, nothing below it does."""


@dataclass(frozen=True)
class FullFineTuning:
    """Every parameter trains: what the other methods are measured against."""


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: expected a whole number >= 1, got {value!r}")
