"""The contest of `dinov3-infer bench` on a GPU: with CUDA graphs, the profiler, and the clocks of the GPU.

Short operations are replayed from a CUDA graph, so that kernels are compared without Python's overhead.
"""

import importlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dinov3_infer.cli.bench import contest as method
from dinov3_infer.cli.bench.contest import Run, Settings, elapsed, reason

L2_BYTES = 60 << 20  # of an H200; inputs rotate through three times as much


@dataclass
class Cell(method.Cell):
    """One row of a table, and what is recorded beside its times."""

    flops: float = 0.0  # of one call
    replay: bool = True  # from a CUDA graph
    notes: dict[str, Any] = field(default_factory=dict)


def contest(
    cell: Cell, settings: Settings, keep: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, Any]:
    """The record of a cell, with each contestant's profile, and clocks before judging and at the end.

    `keep` gets the record each time that a contestant or a round is done.
    """
    before = clocks(settings)

    def whole(found: dict[str, Any]) -> dict[str, Any]:
        return found | {"flops": cell.flops, "clocks": {"before": before}} | cell.notes

    def prepare(run: Run, entry: dict[str, Any]) -> Run:
        entry |= profiled(run, len(cell.inputs), settings)
        if not (settings.cuda and cell.replay):
            return run
        try:
            run = replayed(run)
            entry["replayed"] = True
        except Exception as error:
            torch.cuda.synchronize()
            entry["not_replayed"] = reason(error)
        return run

    found = whole(method.contest(cell, settings, prepare, lambda found: keep(whole(found))))
    found["clocks"]["after"] = clocks(settings)
    return found


def copies(size: int) -> int:
    """How many inputs of so many bytes it takes to fill three times the L2 cache."""
    return min(12, max(2, -(-3 * L2_BYTES // max(1, size))))


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; infinite for another shape or numbers that are not finite."""
    if out.shape != reference.shape or not bool(out.isfinite().all()):
        return float("inf")
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def replayed(run: Run) -> Run:
    """The same kernels from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def profiled(run: Run, inputs: int, settings: Settings, count: int = 3) -> dict[str, Any]:
    """For one input: milliseconds alone, of the host, and of the busy GPU, and the number of kernels.

    `kernels` are the names of the longest, which show the attention that was called.
    """
    found: dict[str, Any] = {"alone_ms": elapsed(run, 1, settings) / inputs}
    begun = time.perf_counter()
    run()
    found["host_ms"] = 1e3 * (time.perf_counter() - begun) / inputs
    if settings.cuda:
        torch.cuda.synchronize()
    activity = ProfilerActivity.CUDA if settings.cuda else ProfilerActivity.CPU
    clock = "self_device_time_total" if settings.cuda else "self_cpu_time_total"
    try:
        with profile(activities=[activity]) as profiler:
            run()
            if settings.cuda:
                torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, clock))
    except RuntimeError as error:  # without a profiler times are still measured
        return found | {"kernels": [reason(error)]}
    busy = [event for event in events if getattr(event, clock) > 0]
    found["busy_ms"] = sum(getattr(event, clock) for event in busy) / 1e3 / inputs
    found["kernel_count"] = sum(event.count for event in busy) / inputs
    return found | {"kernels": [event.key[:160] for event in busy[:count]]}


def clocks(settings: Settings) -> str | None:
    """SM and memory clock, temperature and power from nvidia-smi."""
    return smi("clocks.sm,clocks.mem,temperature.gpu,power.draw") if settings.cuda else None


def smi(query: str) -> str | None:
    """One line of nvidia-smi about the first GPU."""
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def imported(module: str, name: str) -> Any:
    """None if it is not installed or cannot be imported, so that the others run without it."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None
