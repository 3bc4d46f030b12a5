"""The forward pass of a ConvNeXt with weights packed for a CPU; see `plan` for vision transformers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...system import keep_freed_memory
from ..convnext import ConvBlock, ConvNeXt
from ..network import BackboneOutput, Scale, normalised
from .linear import PackedLinear

__all__ = ["ConvNeXtPlan"]

_ROWS = 512  # rows per thread at a time, so that their hidden values stay in the cache
_FEW_ROWS = 16  # fewer rows would use another kernel with other rounding


class ConvNeXtPlan:
    """The computation of a model on float32 pixels, without gradients; holds a second copy of the weights.

    `dtype`: float32 or bfloat16, for matrix products; norms, depthwise convolutions and the stream are float32.
    """

    def __init__(self, model: ConvNeXt, dtype: torch.dtype) -> None:
        self.mode = "exact" if dtype == torch.float32 else "fast"
        keep_freed_memory()
        steps: Any = model.downsample_layers
        convolutions = [step[0] if i == 0 else step[1] for i, step in enumerate(steps)]
        self.steps = [PackedLinear(conv.matrix(), conv.bias, dtype) for conv in convolutions]
        stages: Any = model.stages
        self.stages = [[_Mlp(block, dtype) for block in stage] for stage in stages]

    def __call__(
        self,
        model: ConvNeXt,  # the model of this plan
        pixels: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float32, normalised: one tensor per size
        indices: Sequence[int] = (),  # stages to keep
        scale: Scale = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # mean and std for uint8 pixels
        class_only: bool = False,  # no effect for a ConvNeXt
    ) -> list[BackboneOutput]:
        """The output of the model for each tensor, with the stages `indices` as its layers."""
        return [model.output(self._stages(model, normalised(batch, scale)), indices) for batch in pixels]

    def _stages(self, model: ConvNeXt, pixels: Tensor) -> list[Tensor]:
        model.grid_of(pixels)
        x, maps = pixels.permute(0, 2, 3, 1), []
        steps: Any = model.downsample_layers
        stages: Any = model.stages
        for number, (step, stage) in enumerate(zip(steps, stages, strict=True)):
            packed = self.steps[number]
            if number == 0:
                x = step[1](_rows(packed, step[0].patches(x)))
            else:
                x = _rows(packed, step[1].patches(step[0](x)))
            for block, mlp in zip(stage, self.stages[number], strict=True):
                mlp.add_to(x, block.norm(block.dwconv(x)))
            maps.append(x)
        return maps


class _Mlp:
    """The two linear layers of a block, with LayerScale folded into the second."""

    def __init__(self, block: ConvBlock, dtype: torch.dtype) -> None:
        gamma, second = block.gamma.detach(), block.pwconv2
        self.expand = PackedLinear(block.pwconv1.weight, block.pwconv1.bias, dtype)
        self.contract = PackedLinear(second.weight.detach() * gamma[:, None], second.bias.detach() * gamma, dtype)

    def add_to(self, x: Tensor, normed: Tensor) -> None:  # [B, h, w, C] each
        """Add the MLP of `normed` to x in place, a few rows at a time."""
        stream, rows = x.flatten(0, -2), normed.flatten(0, -2)
        count = max(1, len(rows) // (_ROWS * torch.get_num_threads()))
        for target, some in zip(stream.tensor_split(count), rows.tensor_split(count), strict=True):
            target += _rows(lambda part: self.contract(self.expand(part, "gelu")), self.expand.taken(some))


def _rows(linear: Any, x: Tensor) -> Tensor:
    """Apply a packed linear layer to the last dimension; the result is float32."""
    rows = x.flatten(0, -2)
    if isinstance(linear, PackedLinear):
        rows = linear.taken(rows)
    missing = max(0, _FEW_ROWS - len(rows))
    found = linear(F.pad(rows, (0, 0, 0, missing)) if missing else rows)
    return found[: len(rows)].float().unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]
