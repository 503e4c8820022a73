"""What the GPU tests share."""

import pytest
import torch


@pytest.fixture
def exact_matmul():
    """The bar is torch's true fp32, not TF32, and 16-bit products summed in fp32."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction")
    names += ("allow_fp16_reduced_precision_reduction",)
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)
