"""The operators of the blocks of a training step, forward and backward, as the trainer calls them on a GPU.

Autograd needs a thread for each GPU, so the fake tensors are on "cpu" here, and the functions that the trainer has for
CPUs are replaced by those for other devices.  Nothing here is measured.
"""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from tracing import Op, Trace, faked

from dinov3_infer import Backbone
from dinov3_infer.model.layers import ViTConfig
from dinov3_infer.train import blocks

__all__ = ["step"]

BF16 = torch.bfloat16


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    product = linear(x, weight, bias)
    return product if gamma is None else product * gamma


def _attend(qkv: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Tensor:
    scale = qkv.shape[-1] ** -0.5
    return torch.ops.dinov3_infer.rope_attention(qkv, cos, sin, None, qkv.shape[1], scale)[0]  # type: ignore[no-any-return]


def step(config: ViTConfig, batch: int, size: int, fused: bool, recompute: blocks.Recompute) -> list[Op]:
    """All blocks of a model on images of one size, under autocast to bfloat16.

    `fused`: norms by the kernels of `model.fused`, as on a GPU with Triton; else by torch's separate steps.
    """
    with torch.device("meta"):
        model = Backbone.from_config(config)
    tokens, trace = (size // config.patch_size) ** 2 + config.num_prefix, Trace("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        put = lambda name, value: stack.enter_context(mock.patch.object(blocks, name, value))  # noqa: E731
        put("linear", _linear)
        put("attend", _attend)
        put("kernel_dtype", lambda x, norm: BF16 if fused else None)
        faked(model, device="cpu", trained=True)
        blocks.wrap_blocks(model, False, recompute)  # type: ignore[arg-type]
        x = torch.empty(batch, tokens, config.embed_dim, requires_grad=True)
        table = torch.empty(2, tokens, config.head_dim // 2, dtype=torch.float16).unbind()
        with trace:
            with torch.autocast("cpu", BF16):
                out = x
                for block in model.blocks:
                    out = block(out, table)
            out.backward(torch.empty_like(out))
    return trace.ops
