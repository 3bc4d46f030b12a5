"""A run on disk: weights, moving average and optimiser in one safetensors file, and a small file of state beside it.

The tensors are whole and named by parameter, so that a run goes on with any number of processes.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CheckpointError, DiskError
from .distributed import group, is_main, whole
from .method import Method

__all__ = ["append", "latest", "load", "save"]

_TENSORS, _STATE = "tensors.safetensors", "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def append(path: Path, text: str) -> None:
    """Adds whole lines to a file, or leaves it as it was.  Raises: DiskError."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if path.is_file():
            os.truncate(path, size)
        raise DiskError(f"'{path}' could not be written ({error.strerror}); make room") from None


def _kept(method: Method) -> dict[str, Tensor]:
    """Everything that training changes, by name."""
    fixed = ("teacher.",) if method.config.gram == "renew" else ("teacher.", "gram_teacher.")
    return {name: tensor for name, tensor in method.state_dict().items() if not name.startswith(fixed)}


def _moments(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in method.named_parameters()}
    return {
        f"optimizer.{names[parameter]}.{moment}": state[moment]
        for parameter, state in optimizer.state.items()
        for moment in _MOMENTS
    }


def save(
    folder: Path,  # of all checkpoints
    method: Method,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Writes `folder/<finished steps>` whole or not at all, and removes all but the last `keep`; all processes call it.

    Raises: DiskError; what was there before stays.
    """
    tensors = {}
    for name, tensor in (_kept(method) | _moments(method, optimizer)).items():
        gathered = whole(tensor.detach())
        if is_main():
            tensors[name] = gathered.cpu().contiguous().clone()
    problem: str | None = None
    if is_main():
        target = folder / f"{state['step']:08d}"
        beside = folder / f".{target.name}.{uuid.uuid4().hex[:8]}"
        try:
            for left_over in folder.glob(".*"):  # of a run that was killed while writing
                shutil.rmtree(left_over, ignore_errors=True)
            beside.mkdir(parents=True)
            save_file(tensors, beside / _TENSORS)
            (beside / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(beside, target)
            for old in _all(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            problem = f"the checkpoint of step {state['step']} could not be written to '{folder}' ({reason})"
    if group() is not None:
        box = [problem]
        dist.broadcast_object_list(box)
        problem = box[0]
    if problem:
        raise DiskError(f"{problem}; make room, earlier checkpoints are whole and --resume goes on from them")


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if (path / _STATE).is_file())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path, method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fills method and optimiser; returns the state.

    Raises: CheckpointError for a file that is damaged or of another model.
    """
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
        with safe_open(path / _TENSORS, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {error}") from None
    kept = _kept(method)
    moments = {name for name in stored if name.startswith("optimizer.")}
    if different := sorted((set(stored) - moments) ^ set(kept)):
        raise CheckpointError(
            f"the checkpoint '{path}' is of another model or objective: {different[0]} and {len(different) - 1} others "
            "are only on one side; resume with the configuration it was made with"
        )
    with torch.no_grad():
        for name, tensor in kept.items():
            if tensor.shape != stored[name].shape:
                raise CheckpointError(
                    f"the checkpoint '{path}' holds {name} as {list(stored[name].shape)} and the model has it as "
                    f"{list(tensor.shape)}; resume with the configuration it was made with"
                )
            tensor.copy_(_like(tensor, stored[name]))
        for name, parameter in method.named_parameters():
            if f"optimizer.{name}.step" in moments:
                optimizer.state[parameter] = {
                    moment: stored[f"optimizer.{name}.{moment}"]
                    if moment == "step"
                    else _like(parameter, stored[f"optimizer.{name}.{moment}"]).clone()
                    for moment in _MOMENTS
                }
    return state


def _like(tensor: Tensor, stored: Tensor) -> Tensor:
    """On the device of a tensor, and spread as it is."""
    moved = stored.to(tensor.device)
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else moved
