"""Checks that a resumed run is the one that was started, and cuts its metrics back to the checkpoint."""

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

# Settings that may change when a run is resumed.  Images are compared by their digest.
_FREE = {
    "data", "out", "accumulate", "device", "workers", "recompute", "compile", "engine", "log_steps", "checkpoint_steps",
    "keep_checkpoints", "health_steps", "health_data", "health_pictures", "stop_on_collapse",
}  # fmt: skip


def check_same_run(config: TrainConfig, state: dict[str, Any], digest: str) -> None:
    """Compares settings and images with those of a checkpoint; other settings that differ are logged.

    Args:
        config: settings of the resumed run.
        state: of the checkpoint, see `run_state.read`.
        digest: of the images, see `Data.digest`.

    Raises:
        InputError: seed, batch size or images differ.
    """
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    before = now | state["config"]
    for name in ("seed", "batch_size"):
        if now[name] != before[name]:
            raise InputError(
                f"the run in '{config.out}' has {name}={before[name]}, not {now[name]}; give that value, or start "
                "another run"
            )
    if "data" not in state:
        log.warning("'%s' does not record its images, so it cannot be checked that these are the same", config.out)
    elif state["data"] != digest:
        raise InputError(
            f"the run in '{config.out}' started with other images, or another order of them; give the same images, or "
            "start another run"
        )
    changed = [f"{n} {before[n]} -> {now[n]}" for n in now if now[n] != before[n] and n not in _FREE]
    if changed:
        log.warning("settings changed since the checkpoint: %s", ", ".join(changed))


def write_settings(config: TrainConfig, path: Path) -> None:
    """Writes the settings as JSON; the file is replaced atomically."""
    with whole(path) as beside:
        beside.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")


def cut_metrics(path: Path, step: int) -> None:
    """Removes the lines after a step from metrics.jsonl, since a resumed run writes them again."""
    if not path.is_file():
        return
    *lines, _ = path.read_bytes().split(b"\n")  # a killed run may have left half a line
    steps = [_step_of(line) for line in lines]
    if None in steps:
        log.warning("'%s': removed %d damaged lines", path, steps.count(None))
    kept = [line for line, there in zip(lines, steps, strict=True) if there is not None and (0 <= there <= step > 0)]
    with whole(path) as beside:
        beside.write_bytes(b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None
