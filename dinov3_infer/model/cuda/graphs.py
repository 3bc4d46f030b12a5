"""CUDA graphs of small passes, whose kernels the host launches more slowly than the GPU runs them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..network import BackboneOutput, LayerOutput, Outputs

__all__ = ["Graphs"]

Run = Callable[[Sequence[Tensor]], Outputs]

_SHAPES = 8  # of kept graphs
_MOST = 8 * 3 * 518 * 518  # numbers of the images of a pass; with more the GPU takes longer than the host


class Recorder(Protocol):
    """Records the kernels of a call and runs them again, on the same memory."""

    def stream(self) -> int:
        """The stream in use."""
        ...

    def capture(self, call: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """A function that replays the call, and its outputs, which each replay writes again."""
        ...


class CudaRecorder:
    """By torch, with one pool of memory for all graphs."""

    def __init__(self) -> None:
        self.pool: Any = None

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def capture(self, call: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            found = call()
        return graph.replay, found


@dataclass
class _Graph:
    given: Tensor  # the input is copied into it
    replay: Callable[[], None]
    found: Outputs  # the results are copied from it
    run: Run  # holds the tables that the kernels read


class Graphs:
    """The graphs of a plan, by shape and dtype of the images and by the outputs asked for.

    The first pass of a shape runs without a graph and compiles its kernels; the second is captured.  A replay writes to
    the same memory as the one before, so its input is copied in and its results are copied out under a lock, and on no
    other stream than that of the first capture.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or (CudaRecorder() if torch.cuda.is_available() else None)
        self.kept: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: seen once
        self.home: int | None = None  # the stream
        self.lock = threading.Lock()

    def __call__(self, run: Run, pixels: Sequence[Tensor], what: Hashable) -> Outputs:
        """`run` of one tensor of images, [B, 3, H_px, W_px]."""
        (images,) = pixels
        if self.recorder is None or images.numel() > _MOST:
            return run(pixels)
        with self.lock:
            stream = self.recorder.stream()
            self.home = stream if self.home is None else self.home
            if stream != self.home:
                return run(pixels)
            key = (what, images.shape, images.dtype)
            graph = self.kept.get(key)
            if graph is None:
                if key not in self.kept:
                    self._keep(key, None)
                    return run(pixels)
                with torch.inference_mode(False), torch.no_grad():  # writable outside of inference mode
                    given = images.clone()
                    graph = _Graph(given, *self.recorder.capture(lambda: run([given])), run)
                self._keep(key, graph)
            self.kept.move_to_end(key)
            graph.given.copy_(images, non_blocking=True)
            graph.replay()
            return _copied(graph.found)

    def _keep(self, key: Hashable, graph: _Graph | None) -> None:
        self.kept[key] = graph
        if len(self.kept) > _SHAPES:
            self.kept.popitem(last=False)


def _copied(found: Outputs) -> Outputs:
    """A copy, in one kernel for tokens that lie in one tensor."""

    def whole(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        first, registers, patches = parts
        joined = torch.cat((first.unsqueeze(1), registers, patches), dim=1)
        first, registers, patches = joined.split([1, registers.shape[1], patches.shape[1]], dim=1)
        return first.squeeze(1), registers, patches

    outputs = [
        BackboneOutput(*whole(output[:3]), tuple(LayerOutput(*whole(layer)) for layer in output.layers))
        for output in found
    ]
    return Outputs(outputs, None if found.total is None else found.total.clone())
