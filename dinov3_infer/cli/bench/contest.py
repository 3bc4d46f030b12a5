"""The method: each contestant's result is checked first, then all are timed in interleaved rounds.

A contestant with a wrong result is reported and not timed.  Times come from CUDA events on a GPU, from the wall clock
on a CPU.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch

__all__ = ["Cell", "Run", "Settings", "contest", "interleaved", "ratios", "reason", "spread"]

Run = Callable[[], Any]
Entry = dict[str, Any]  # the record of a contestant
Prepare = Callable[[Run, Entry], Run]
Keep = Callable[[Entry], None]  # called with the record of a cell whenever it grows


def say_nothing(what: str) -> None:
    """Reports no progress.  A named function, since settings are pickled for other processes."""


@dataclass(frozen=True)
class Settings:
    device: torch.device
    rounds: int = 9
    least_ms: float = 6.0  # shortest measurement; faster runs are repeated
    tell: Callable[[str], None] = say_nothing  # reports progress

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.device.type == "cuda"


@dataclass
class Cell:
    """One row of a table: contestants with the same inputs."""

    what: dict[str, Any]  # name of the row, such as tokens and heads
    inputs: Sequence[Any]
    contestants: Mapping[str, Callable[[Any], Any]]
    judge: Callable[[Any], float]  # error of the output for the first input
    limit: float | Mapping[str, float]  # largest error allowed, for all contestants or by name


def contest(
    cell: Cell, settings: Settings, prepare: Prepare | None = None, keep: Keep = lambda record: None
) -> dict[str, Any]:
    """Checks and times the contestants of a cell.

    Args:
        cell: the contestants and their inputs.
        settings: device, rounds and shortest measurement.
        prepare: turns a run over all inputs, and the entry of its contestant, into the run that is timed.
        keep: called with the record after each contestant and after each round.

    Returns:
        The record: for each contestant its error, its memory and `rounds_ms` (milliseconds per input in each round), or
        the reason why it was refused.
    """
    found: dict[str, Entry] = {}
    runs: dict[str, Run] = {}
    record = {"cell": cell.what, "inputs": len(cell.inputs), "contestants": found}
    for name, call in cell.contestants.items():
        settings.tell(name)
        limit = cell.limit if isinstance(cell.limit, float) else cell.limit[name]
        try:
            found[name] = entry = _judged(call, cell, limit, settings)
            if "refused" not in entry:
                run = partial(_over_all, call, cell.inputs)
                run()
                runs[name] = run if prepare is None else prepare(run, entry)
        except Exception as error:  # a contestant that cannot run is a result
            found[name] = {"refused": reason(error)}
            if settings.cuda:
                torch.cuda.empty_cache()
        keep(record)

    def take(times: Mapping[str, list[float]]) -> None:
        for name, each in times.items():
            found[name]["rounds_ms"] = [ms / len(cell.inputs) for ms in each]
        keep(record)

    take(interleaved(runs, settings, after_round=take))
    return record


def _judged(call: Callable[[Any], Any], cell: Cell, limit: float, settings: Settings) -> Entry:
    """Error and memory of a contestant; the first call may compile, the second one is measured."""
    error = cell.judge(call(cell.inputs[0]))
    if not error <= limit:
        return {"error": error, "refused": f"wrong: error {error:.2g}, {limit:.2g} is allowed"}
    entry: Entry = {"error": error}
    if settings.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call(cell.inputs[0])
        torch.cuda.synchronize()
        entry["peak_mib"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
    return entry


def _over_all(call: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
    for given in inputs:
        call(given)


def interleaved(
    runs: Mapping[str, Run],
    settings: Settings,
    seed: int = 0,
    after_round: Callable[[Mapping[str, list[float]]], None] = lambda times: None,
) -> dict[str, list[float]]:
    """Milliseconds of one run in each round, by name; each round has another random order.

    Args:
        runs: functions to time, by name.
        settings: device, rounds and shortest measurement.
        seed: of the order.
        after_round: called with the times so far.
    """
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
        after_round(times)
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
    """Their time divided by ours, for each round."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def reason(error: Exception) -> str:
    """The first line of an exception, with its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]
