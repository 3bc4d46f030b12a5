"""The method: contestants are judged first, then timed in interleaved rounds over rotating inputs.

A wrong contestant is reported and not timed.  On a GPU time is that between CUDA events; short operations are replayed
from a CUDA graph, so that it is the kernels that are compared and not Python.  On a CPU it is a plain clock.
"""

import ctypes
import importlib
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "Cell", "Run", "Settings", "clocks", "contest", "copies", "imported", "interleaved", "mend_signal_stack",
    "mend_torchvision", "ratios", "reason", "relative_error", "replayed", "smi", "spread",
]  # fmt: skip

L2_BYTES = 60 << 20  # of an H200; inputs rotate through three times as much
Run = Callable[[], Any]


def say_nothing(what: str) -> None:
    """A function with a name, since settings go to other processes."""


@dataclass(frozen=True)
class Settings:
    device: torch.device
    rounds: int = 9
    least_ms: float = 6.0  # of one measurement
    kernels: bool = True  # look which take the time
    tell: Callable[[str], None] = say_nothing  # of progress

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Cell:
    """One row of a table: the same inputs for all."""

    what: dict[str, Any]  # tokens, heads and so on: names the row
    inputs: Sequence[Any]
    contestants: Mapping[str, Callable[[Any], Any]]
    judge: Callable[[Any], float]  # relative error of what the first input gave
    limit: float | Mapping[str, float]  # of that error, for all or for each
    flops: float = 0.0  # of one call
    replay: bool = True  # from a CUDA graph
    notes: dict[str, Any] = field(default_factory=dict)


def copies(size: int) -> int:
    """How many inputs of so many bytes it takes to fill three times the L2 cache."""
    return min(12, max(2, -(-3 * L2_BYTES // max(1, size))))


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; infinite for another shape or what is not finite."""
    if out.shape != reference.shape or not bool(out.isfinite().all()):
        return float("inf")
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def contest(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The record of a cell: error, memory, longest kernels and times of each contestant, or why it has none.

    `rounds_ms` are the milliseconds of one input in each round.
    """
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, tuple[Run, int]] = {}
    for name, call in cell.contestants.items():
        settings.tell(name)
        limit = cell.limit if isinstance(cell.limit, float) else cell.limit[name]
        try:
            found[name] = entry = _judged(call, cell, limit, settings)
            if "refused" not in entry:
                runs[name] = (_prepared(call, cell, settings, entry), len(cell.inputs))
        except Exception as error:  # a contestant that cannot run is a result
            found[name] = {"refused": reason(error)}
            if settings.cuda:
                torch.cuda.empty_cache()
    before = clocks(settings)
    for name, times in interleaved({name: run for name, (run, _) in runs.items()}, settings).items():
        found[name]["rounds_ms"] = [ms / runs[name][1] for ms in times]
    state = {"before": before, "after": clocks(settings)}
    return {"cell": cell.what, "flops": cell.flops, "inputs": len(cell.inputs), "clocks": state} | cell.notes | {
        "contestants": found
    }  # fmt: skip


def _judged(call: Callable[[Any], Any], cell: Cell, limit: float, settings: Settings) -> dict[str, Any]:
    """Error, memory and kernels; the first call compiles, the second is looked at."""
    error = cell.judge(call(cell.inputs[0]))
    if not error <= limit:
        return {"error": error, "refused": f"wrong: error {error:.2g}, {limit:.2g} is allowed"}
    entry: dict[str, Any] = {"error": error}
    if settings.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call(cell.inputs[0])
        torch.cuda.synchronize()
        entry["peak_mib"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
    if settings.kernels:
        entry["kernels"] = longest_kernels(lambda: call(cell.inputs[0]), settings)
    return entry


def _prepared(call: Callable[[Any], Any], cell: Cell, settings: Settings, entry: dict[str, Any]) -> Run:
    def all_inputs() -> None:
        for given in cell.inputs:
            call(given)

    all_inputs()
    if not (settings.cuda and cell.replay):
        return all_inputs
    try:
        run = replayed(all_inputs)
        entry["replayed"] = True
        return run
    except Exception as error:
        torch.cuda.synchronize()
        entry["not_replayed"] = reason(error)
        return all_inputs


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


def interleaved(runs: Mapping[str, Run], settings: Settings, seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of one run in each round; within a round the order is drawn anew."""
    repeats = {}
    for name, run in runs.items():
        elapsed(run, 1, settings)
        repeats[name] = max(1, min(200, round(settings.least_ms / max(1e-3, elapsed(run, 1, settings)))))
    order, draw = list(runs), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(settings.rounds):
        settings.tell(f"round {number + 1} of {settings.rounds}")
        draw.shuffle(order)
        for name in order:
            times[name].append(elapsed(runs[name], repeats[name], settings))
    return times


def elapsed(run: Run, repeats: int, settings: Settings) -> float:
    """Milliseconds of one run."""
    if not settings.cuda:
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - begun) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Of the times of each round."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def longest_kernels(run: Run, settings: Settings, count: int = 3) -> list[str]:
    """Names of the kernels that take most time: which attention it is that a call comes down to."""
    activity = ProfilerActivity.CUDA if settings.cuda else ProfilerActivity.CPU
    clock = "self_device_time_total" if settings.cuda else "self_cpu_time_total"
    try:
        with profile(activities=[activity]) as profiler:
            run()
            if settings.cuda:
                torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, clock))
    except RuntimeError as error:  # no profiler here is no reason not to measure
        return [reason(error)]
    return [event.key[:160] for event in events[:count] if getattr(event, clock) > 0]


def clocks(settings: Settings) -> str | None:
    """SM and memory clock, temperature and power as nvidia-smi has them."""
    return smi("clocks.sm,clocks.mem,temperature.gpu,power.draw") if settings.cuda else None


def smi(query: str) -> str | None:
    """One line of nvidia-smi about the first GPU."""
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def imported(module: str, name: str) -> Any:
    """None for what is not installed, or is and cannot be imported: others go on without it."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


def mend_torchvision() -> None:
    """Makes a torchvision importable whose own library does not fit this torch, and so transformers and timm."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # it describes two operators that the library should have brought
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    except ImportError:  # whoever needs it says so
        return


def mend_signal_stack() -> None:
    """Lets signal handlers run on the ordinary stack of this thread.

    OpenVINO 2026.4 gives them one of its own when a model is freed, and frees that too: the next signal, such as that a
    worker has ended, would end the process.
    """
    if sys.platform == "linux":
        none = struct.pack("@Pi4xN", 0, 2, 0)  # stack_t with SS_DISABLE
        ctypes.CDLL(None).sigaltstack(none, None)


_KEPT: list[Any] = []  # what a library defines goes with it


def reason(error: Exception) -> str:
    """One line of an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]
