"""One rank of test_distributed.py: the gradients of its half of a batch, averaged over both.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python distributed_worker.py OUT

For each KIND (ddp, fsdp) and METHOD rank 0 writes OUT/KIND/METHOD/gradients.safetensors and the
adapter beside it; rank 1 saves as well, as every rank of FSDP2 must, and throws it away.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import fusedpeft as fp

CONFIGS = {
    "lora": fp.LoRA(rank=3),
    "dora": fp.LoRA(rank=3, dora=True),
    "bottleneck": fp.BottleneckAdapter(size=8),
    "prefix": fp.PrefixTuning(length=4),
    "projected": fp.PrefixTuning(length=4, projection=6),
    "prompt": fp.PromptTuning(length=4),
    "fused loss": fp.LoRA(rank=3),
}


def build(method: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = fp.attach(LlamaForCausalLM(config), CONFIGS[method])
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape) * 0.1)
    return model


def batch() -> torch.Tensor:
    return torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(1))


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model(ids, labels=ids).loss.backward()
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {
        n: g.full_tensor() if isinstance(g, DTensor) else g
        for n, g in found.items()
        if g is not None
    }


def run(method: str, kind: str, rank: int, out: Path) -> None:
    model = build(method)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    if kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        if method == "fused loss":  # whose weight is whole only in its own call
            fully_shard(model.lm_head)
        fully_shard(model)
    if method == "fused loss":
        fp.fuse_loss(model)
    grads = gradients(wrapped, batch().chunk(2)[rank])
    fp.save_adapter(model, out)
    save_file({n: g.contiguous() for n, g in grads.items()}, out / "gradients.safetensors")


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for kind in ("ddp", "fsdp"):
        for method in CONFIGS:
            run(method, kind, rank, out / kind / method if rank == 0 else out / "of_rank_1")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
