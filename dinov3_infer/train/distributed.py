"""What changes with more than one process, and nothing without: every function is a no-op then."""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig

__all__ = [
    "Engine",
    "device_of",
    "group",
    "is_main",
    "joined",
    "local",
    "mean_of",
    "mean_over",
    "rank",
    "whole",
    "world_size",
]


def device_of(config: TrainConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes of `torchrun`, if there are any, and says which device this one has."""
    if "WORLD_SIZE" not in os.environ or not dist.is_available() or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def group() -> dist.ProcessGroup | None:
    """All processes; None for a single one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def rank() -> int:
    return dist.get_rank() if group() is not None else 0


def world_size() -> int:
    return dist.get_world_size() if group() is not None else 1


def is_main() -> bool:
    return rank() == 0


def mean_of(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if group() is None:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


def mean_over(rows: Tensor) -> Tensor:
    """[n, C] -> the mean over the rows of all processes, [C]; n may differ between processes."""
    both = torch.cat((rows.sum(0), rows.new_tensor([len(rows)])))
    if group() is not None:
        dist.all_reduce(both)
    return both[:-1] / both[-1].clamp(min=1)


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor whose parts lie on several processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Engine:
    """Runs a Method's forward so that gradients are means over the processes."""

    def __init__(self, method: nn.Module, kind: Literal["ddp", "fsdp"], unused: bool = False) -> None:
        self.sharded: list[FSDPModule] = []
        self.call: nn.Module = method
        if group() is None:
            return
        if kind == "fsdp":
            self.sharded = shard(method)
        else:  # `unused`: some parameters get no gradient at some steps
            warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)  # of sides of length 1
            self.call = DistributedDataParallel(method, find_unused_parameters=unused)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one part of a batch: processes meet at the last one only."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last)
        if isinstance(self.call, DistributedDataParallel) and not last:
            return self.call.no_sync()
        return nullcontext()


def shard(method: nn.Module) -> list[FSDPModule]:
    """Splits every part of student and teachers over the processes, each block a unit of its own."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # nobody writes into it
    units = []
    roots = [part for name in ("student", "ema") for part in getattr(method, name).values()]
    roots += [part for name in ("teacher", "gram_teacher") if (part := getattr(method, name)) is not None]
    for root in roots:
        for block in getattr(root, "blocks", ()):
            units.append(fully_shard(block))
            register_fsdp_forward_method(block, "forward_dropped")
        units.append(fully_shard(root, reshard_after_forward=True))  # without a backward pass too, as the teachers'
        if hasattr(root, "forward_packed"):
            register_fsdp_forward_method(root, "forward_packed")
    return units
