"""The method: contestants are judged first, then timed in interleaved rounds over rotating inputs.

A wrong contestant is reported and not timed.  On a GPU time is that between CUDA events, on a CPU a plain clock.
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
Entry = dict[str, Any]  # what is recorded of a contestant
Prepare = Callable[[Run, Entry], Run]
Keep = Callable[[Entry], None]  # given the record of a cell each time that it has grown


def say_nothing(what: str) -> None:
    """A function with a name, since settings go to other processes."""


@dataclass(frozen=True)
class Settings:
    device: torch.device
    rounds: int = 9
    least_ms: float = 6.0  # of one measurement
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


def contest(
    cell: Cell, settings: Settings, prepare: Prepare | None = None, keep: Keep = lambda record: None
) -> dict[str, Any]:
    """The record of a cell: error, memory and times of each contestant, or why it has none.

    `rounds_ms` are the milliseconds of one input in each round.  `prepare` is given a run over all inputs and the entry
    of its contestant, and gives what is timed.  `keep` is called after each contestant and after each round.
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
    """Error and memory; the first call compiles, the second is looked at."""
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
    """Milliseconds of one run in each round; within a round the order is drawn anew.

    `after_round` is given those up to then.
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
    """Of the times of each round."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def reason(error: Exception) -> str:
    """One line of an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]
