"""Training with several processes; with a single process every function here does nothing."""

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
    """The device of a run: `config.device`, with "auto" as cuda if there is one, else cpu."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes of `torchrun`, if there are several, and yields the device of this process."""
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
    """The group of all processes; None for a single process."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if group() is not None else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if group() is not None else 1


def is_main() -> bool:
    """Whether this process is the first, which writes the files."""
    return rank() == 0


def mean_of(value: Tensor) -> Tensor:
    """The mean over the processes of a tensor of any shape, which all of them give."""
    if group() is None:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


def mean_over(rows: Tensor) -> Tensor:
    """The mean [C] of the rows [n, C] of all processes; n may differ between processes."""
    both = torch.cat((rows.sum(0), rows.new_tensor([len(rows)])))
    if group() is not None:
        dist.all_reduce(both)
    return both[:-1] / both[-1].clamp(min=1)


def local(tensor: Tensor) -> Tensor:
    """This process' shard of a tensor of any shape; shares its memory.  Other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor of a sharded one, of any shape; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Engine:
    """Runs the forward pass of a `Method` so that gradients are averaged over the processes.

    Args:
        method: the model.
        kind: "ddp" replicates the model, "fsdp" shards it.
        unused: with "ddp", allow parameters that get no gradient at some steps.
    """

    def __init__(self, method: nn.Module, kind: Literal["ddp", "fsdp"], unused: bool = False) -> None:
        self.sharded: list[FSDPModule] = []
        self.call: nn.Module = method
        if group() is None:
            return
        if kind == "fsdp":
            self.sharded = shard(method)
        else:
            warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)  # of sides of length 1
            self.call = DistributedDataParallel(method, find_unused_parameters=unused)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context for one part of a batch, in which gradients are averaged only if the part is the last one."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last)
        if isinstance(self.call, DistributedDataParallel) and not last:
            return self.call.no_sync()
        return nullcontext()


def shard(method: nn.Module) -> list[FSDPModule]:
    """Shards student and teachers over the processes, with each block as a unit; returns the units."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # never written to
    units = []
    roots = [part for name in ("student", "ema") for part in getattr(method, name).values()]
    roots += [part for name in ("teacher", "gram_teacher") if (part := getattr(method, name)) is not None]
    for root in roots:
        for block in getattr(root, "blocks", ()):
            units.append(fully_shard(block))
            register_fsdp_forward_method(block, "forward_dropped")
        units.append(fully_shard(root, reshard_after_forward=True))  # also after a forward pass without backward
        if hasattr(root, "forward_packed"):
            register_fsdp_forward_method(root, "forward_packed")
    return units
