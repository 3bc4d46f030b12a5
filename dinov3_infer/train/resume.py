"""Whether a run that is resumed is the one that was begun, and its metrics up to there."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..system import whole
from .config import TrainConfig

__all__ = ["check_same_run", "cut_metrics", "write_settings"]

log = logging.getLogger("dinov3_infer")

# What may change without making another run of it; images are compared by themselves.
_FREE = {
    "data", "out", "accumulate", "device", "workers", "recompute", "compile", "engine", "log_steps", "checkpoint_steps",
    "keep_checkpoints", "health_steps", "health_data", "health_pictures", "stop_on_collapse",
}  # fmt: skip


def check_same_run(config: TrainConfig, state: dict[str, Any], digest: str) -> None:
    """Compares settings and images (`Data.digest`) with those of a checkpoint.

    Raises: InputError for another seed, batch size or other images; other settings are named in the log.
    """
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    before = now | state["config"]
    for name in ("seed", "batch_size"):
        if now[name] != before[name]:
            raise InputError(
                f"the run in '{config.out}' has {name} {before[name]}, not {now[name]}; leave that out, or begin "
                "another run"
            )
    if "data" not in state:
        log.warning("'%s' does not say which images it began with, so these are taken unchecked", config.out)
    elif state["data"] != digest:
        raise InputError(
            f"the run in '{config.out}' began with other images, or with these in another order; give those that it "
            "began with, or begin another run"
        )
    changed = [f"{n} {before[n]} -> {now[n]}" for n in now if now[n] != before[n] and n not in _FREE]
    if changed:
        log.warning("going on with other settings than before: %s", ", ".join(changed))


def write_settings(config: TrainConfig, path: Path) -> None:
    with whole(path) as beside:
        beside.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")


def cut_metrics(path: Path, step: int) -> None:
    """Leaves the lines up to a step: a resumed run says again what came after its checkpoint."""
    if not path.is_file():
        return
    *lines, _ = path.read_bytes().split(b"\n")  # a killed run may have left half of one
    steps = [_step_of(line) for line in lines]
    if None in steps:
        log.warning("'%s': %d damaged lines are left out", path, steps.count(None))
    kept = [line for line, there in zip(lines, steps, strict=True) if there is not None and (0 <= there <= step > 0)]
    with whole(path) as beside:
        beside.write_bytes(b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None
