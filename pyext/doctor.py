"""`fusedpeft doctor`: what is installed, what was built, and which implementation each op takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json as json_
import os
import platform

import torch

from fusedpeft import __version__
from fusedpeft.kernels.device import arch_of
from fusedpeft.ops import adapter
from fusedpeft.ops.adapter_native import MAX_CUDA_TOKENS as MAX_ADAPTER_TOKENS
from fusedpeft.ops.linear_logprob import choose_impl as choose_logprob_impl
from fusedpeft.ops.lora import MAX_DECODE_TOKENS, choose_impl
from fusedpeft.ops.lora_choice import choose as choose_on_cuda
from fusedpeft.ops.lora_quantised import choose_impl as choose_quantised_impl
from fusedpeft.ops.multi_adapter import choose_impl as choose_multi_adapter_impl
from fusedpeft.ops.multi_lora import MAX_CUDA_TOKENS
from fusedpeft.ops.multi_lora import choose_impl as choose_multi_impl
from fusedpeft.ops.native import native
from fusedpeft.ops.prefix_attention import choose_impl as choose_prefix_impl
from fusedpeft.ops.prefix_decode_impls import choose_impl as choose_prefix_decode_impl
from fusedpeft.ops.soft_prompt import choose_impl as choose_soft_prompt_impl

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "lm_eval")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"fusedpeft": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        here = importlib.util.find_spec(name) is not None
        found[name] = importlib.metadata.version(name) if here else None
    found["torch"] = torch.__version__  # with the build, such as +cu130
    return found


def _devices() -> list[dict]:
    found: list[dict] = [
        {"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}
    ]
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": props.name,
                "capability": f"{props.major}.{props.minor}",
                "memory_bytes": props.total_memory,
            }
        )
    return found


def _extension() -> dict:
    """What `fusedpeft._C` was built with; {"built": False, "fix": …} where it is not there."""
    if native is None:
        return {"built": False, "fix": "build it: pip install -e . (needs a C++ compiler)"}
    return {
        "built": True,
        "cpu_capability": native.cpu_capability(),
        "fusedpeft_cpu": os.environ.get("FUSEDPEFT_CPU"),
        **native.build_info(),
    }


def _lora_on_cuda(cuda: bool, triton: bool) -> list[dict]:
    """Some shapes of a linear of 4096², R 16; Hopper's answers where there is no GPU."""
    arch = arch_of(torch.device("cuda")) if cuda else "sm_90"
    found = []
    for tokens, dtype, elem_bytes in (
        (64, "bf16", 2), (1024, "bf16", 2), (8192, "bf16", 2), (1024, "fp32", 4)
    ):  # fmt: skip
        for kind in ("fwd", "bwd"):
            sizes = (tokens, 4096, 4096, 16, arch)
            impl, why = choose_on_cuda(kind, *sizes, elem_bytes=elem_bytes)
            if impl == "triton" and not triton:
                impl, why = "raises", "triton is not installed: pip install triton"
            elif not cuda:
                why += f"; {arch}, no CUDA device here"
            case = f"CUDA {kind}, {tokens} tokens, 4096², R 16, {dtype}"
            found.append({"op": "lora_linear", "case": case, "impl": impl, "why": why})
    why = "as lora_linear of all widths side by side"
    found.append({"op": "lora_linear_multi", "case": "CUDA", "impl": "by shape", "why": why})
    return found


def _choices(cuda: bool, triton: bool) -> list[dict]:
    """One entry for an op and a case of it: implementation and reason, from the real dispatch."""
    most = MAX_DECODE_TOKENS
    cases = [
        (f"CPU, 1-{most} tokens, no grad", "cpu", 1, False),
        (f"CPU, more than {most} tokens, no grad", "cpu", most + 1, False),
        ("CPU, training", "cpu", 1024, True),
        (f"CUDA, 1-{most} tokens, no grad", "cuda", 1, False),
    ]
    kernel = {"cpu": native is not None, "cuda": hasattr(native, "multi_lora_cuda")}
    found = []
    for label, device, tokens, grad in cases:
        impl, why = choose_impl(device, tokens, grad, kernel[device])
        if tokens <= most and not kernel[device]:
            why = f"fusedpeft._C is not built{' with CUDA' if device == 'cuda' else ''}"
        for op in ("lora_linear", "lora_linear_multi"):
            found.append({"op": op, "case": label, "impl": impl, "why": why})
    found += _lora_on_cuda(cuda, triton)
    for device in ("cpu", "cuda"):
        for tokens, label in ((MAX_CUDA_TOKENS, "1-64 tokens"), (MAX_CUDA_TOKENS + 1, "more")):
            impl, why = choose_multi_impl(device, tokens, native is not None, kernel["cuda"])
            case = f"{device.upper()}, {label}"
            found.append({"op": "multi_lora_linear", "case": case, "impl": impl, "why": why})
        for tokens, label in ((most, f"1-{most} tokens"), (most + 1, "more")):
            impl, why = choose_quantised_impl(device, torch.float32, tokens, native is not None)
            case = f"{device.upper()}, {label}, W in NF4 or FP8"
            found.append({"op": "lora_linear", "case": case, "impl": impl, "why": why})
        impl, why = adapter.choose_impl(device, torch.float32)
        found.append({"op": "bottleneck_adapter", "case": device.upper(), "impl": impl, "why": why})
        for tokens, label in (
            (1, f"1-{MAX_ADAPTER_TOKENS} tokens"),
            (MAX_ADAPTER_TOKENS + 1, "more"),
        ):
            impl, why = choose_multi_adapter_impl(device, tokens)
            case = f"{device.upper()}, {label}"
            row = {"op": "multi_bottleneck_adapter", "case": case, "impl": impl, "why": why}
            found.append(row)
        impl, why = choose_prefix_impl(device, flash=native is not None)
        found.append({"op": "prefix_attention", "case": device.upper(), "impl": impl, "why": why})
        decode, why = choose_prefix_decode_impl(device, torch.float32)
        row = {"op": "prefix_decode_attention", "case": device.upper(), "impl": decode, "why": why}
        impl, why = choose_prefix_impl(device, decode)
        label = f"{device.upper()}, at most 8 queries, no grad"
        found += [row, {"op": "prefix_attention", "case": label, "impl": impl, "why": why}]
    by_dtype = {
        "linear_logprob": choose_logprob_impl,
        "linear_cross_entropy": choose_logprob_impl,
        "soft_prompt_embedding": choose_soft_prompt_impl,
    }
    for op, choose in by_dtype.items():
        for device in ("cpu", "cuda"):
            impl, why = choose(device, torch.float32)
            found.append({"op": op, "case": device.upper(), "impl": impl, "why": why})
    for op in ("ranking_loss", "pro_loss"):
        why = "a few numbers a candidate: plain torch"
        found.append({"op": op, "case": "any device", "impl": "torch", "why": why})
    return found


def diagnose() -> dict:
    """Everything `doctor` prints, as plain data."""
    versions = _versions()
    return {
        "versions": versions,
        "devices": _devices(),
        "extension": _extension(),
        "ops": _choices(torch.cuda.is_available(), versions["triton"] is not None),
    }


def doctor(json: bool = False) -> None:
    """Prints versions, devices, the extension's build and each op's implementation here.

    json: one JSON document instead of tables.
    """
    found = diagnose()
    if json:
        print(json_.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log or a pipe

    def table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
        made = Table(*header)
        for row in rows:
            made.add_row(*(Text(str(cell)) for cell in row))
        console.print(Text(title, style="bold"))
        console.print(made)

    rows = [(name, v or "not installed") for name, v in found["versions"].items()]
    table("Versions", ("package", "version"), rows)
    table(
        "Devices",
        ("device", "name", "details"),
        [
            (d["device"], d["name"], _details({k: d[k] for k in d if k not in ("device", "name")}))
            for d in found["devices"]
        ],
    )
    table("Extension fusedpeft._C", ("what", "value"), list(found["extension"].items()))
    table(
        "Which implementation each op takes here",
        ("op", "case", "implementation", "why"),
        [(o["op"], o["case"], o["impl"], o["why"]) for o in found["ops"]],
    )


def _details(values: dict) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())
