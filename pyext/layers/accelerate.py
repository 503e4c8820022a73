"""One line for an existing PEFT model: its LoRA linears run on the fused op."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from fusedpeft.errors import InputError


@dataclass
class AccelerateReport:
    """What `accelerate` swapped, found swapped already, and left as it was, with the reason."""

    swapped: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused {len(self.swapped)} LoRA linears"]
        if self.already:
            lines[0] += f" ({len(self.already)} were already)"
        for reason, count in Counter(self.kept.values()).items():
            example = next(path for path, r in self.kept.items() if r == reason)
            lines.append(f"kept {count} on PEFT's own code: {reason} (such as {example})")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerateReport:
    """Run the `lora.Linear` modules of a PEFT model on the fused op, in place.

    The class of each module changes, nothing else: parameters, state dict, optimiser, merge,
    disable_adapter, set_adapter, mixed batches, DoRA and saving go on as before, and cases that the
    op does not cover run PEFT's own forward. Dropout draws another mask than PEFT would from the
    same seed. Call it again after `add_adapter` has wrapped new modules; twice is harmless. DoRA's
    norms are kept between writes: on a GPU one through `.data` has to be told (see `LoRA`).

    Raises InputError where the model carries no adapter of PEFT's, and ModuleNotFoundError where
    PEFT is not installed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from fusedpeft.layers.peft_linear import FusedLinear, why_not

    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate: expected a PEFT model, got {type(model).__name__}")
    report = AccelerateReport()
    for path, module in model.named_modules():
        if type(module) is FusedLinear:
            report.already.append(path)
        elif isinstance(module, BaseTunerLayer):
            reason = why_not(module)
            if reason is None:
                module.__class__ = FusedLinear
                report.swapped.append(path)
            else:
                report.kept[path] = reason
    if not (report.swapped or report.already or report.kept):
        raise InputError(
            f"accelerate: {type(model).__name__} has no adapter of PEFT's; for a plain model use "
            "fusedpeft.attach(model, fusedpeft.LoRA())"
        )
    return report
