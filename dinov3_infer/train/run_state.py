"""A run on disk: weights, moving average and optimiser in one safetensors file, with a small JSON file beside it.

The tensors are unsharded and named by parameter, so that any number of processes can resume the run.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..backbone import Backbone
from ..errors import CheckpointError, DiskError, UnsupportedError
from ..system import sha256
from .distributed import group, is_main, whole
from .method import Method

__all__ = ["LeftOut", "append", "latest", "load", "read", "save", "write_model"]

log = logging.getLogger("dinov3_infer")

_TENSORS, _STATE = "tensors.safetensors", "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def append(path: Path, text: str) -> None:
    """Appends complete lines to a file, or leaves it unchanged.  Raises: DiskError."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if path.is_file():
            os.truncate(path, size)
        raise DiskError(f"'{path}' could not be written ({error.strerror}); free some space") from None


class LeftOut:
    """Reports images that could not be read: each as a line in a file, the first three also in the log."""

    def __init__(self, path: Path) -> None:
        self._path, self._told = path, set[int]()
        if path.is_file():  # of a resumed run
            lines = path.read_text(encoding="utf-8").splitlines()
            self._told = {json.loads(line)["image"] for line in lines if line.endswith("}")}

    def tell(self, broken: Mapping[int, str]) -> None:
        """Reports the broken images that it has not reported yet.  `broken`: number -> reason, for all of them."""
        new = {number: reason for number, reason in broken.items() if number not in self._told}
        if not new:
            return
        for reason in list(new.values())[: max(0, 3 - len(self._told))]:
            log.warning("skipped an image and used another one instead: %s", reason)
        lines = (json.dumps({"image": number, "error": reason}) + "\n" for number, reason in sorted(new.items()))
        try:
            append(self._path, "".join(lines))
        except DiskError:
            return  # these are reported again; the writer of the metrics warns about the disk
        self._told |= set(new)


def _kept(method: Method) -> dict[str, Tensor]:
    """All tensors that training changes, by name."""
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
    folder: Path,
    method: Method,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Writes the checkpoint `folder`/<finished steps> completely or not at all; all processes must call it.

    Args:
        folder: of all checkpoints.
        method: the model.
        optimizer: its optimiser.
        state: what `read` will return; "step" is the number of finished steps.
        keep: newest checkpoints to keep; older ones are removed.

    Raises:
        DiskError: the checkpoint could not be written; earlier checkpoints are kept.
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
            sealed = state | {"sha256": sha256(beside / _TENSORS)}
            (beside / _STATE).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
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
        raise DiskError(f"{problem}; free some space and --resume, which continues from the last complete checkpoint")


def write_model(backbone: Backbone, folder: Path) -> None:
    """Writes a model in the layout of transformers, or of Meta if transformers has no model that fits."""
    try:
        backbone.save_pretrained(folder)
    except UnsupportedError:
        backbone.save_pretrained(folder / "model.safetensors", layout="meta")


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit() and (path / _STATE).is_file())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None; a warning names one that has no state file and is ignored."""
    found = _all(folder)
    for path in folder.glob("[0-9]*"):
        if not (path / _STATE).is_file() and (not found or path.name > found[-1].name):
            log.warning("ignoring the checkpoint '%s', which has no %s", path, _STATE)
    return found[-1] if found else None


def read(path: Path) -> dict[str, Any]:
    """The state of a checkpoint: step, settings, digest of the images and SHA-256 of the tensors.

    Raises:
        CheckpointError: the checkpoint is damaged, or its state names another step than its folder.
    """
    way = "remove that folder and --resume, which continues from the checkpoint before it, if there is one"
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        step, config = state["step"], state["config"]
        if type(step) is not int or not isinstance(config, dict):
            raise ValueError("it has no step or no settings")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = error if isinstance(error, OSError) else "it is damaged"
        raise CheckpointError(f"the state file '{path / _STATE}' cannot be read ({reason}); {way}") from None
    if step != int(path.name):
        raise CheckpointError(f"the state file '{path / _STATE}' is of step {step}, unlike its folder; {way}")
    digest = state.get("sha256")
    if digest is None:
        log.warning("the checkpoint '%s' is of a version without checksums, so its tensors are not checked", path)
    elif not (path / _TENSORS).is_file() or sha256(path / _TENSORS) != digest:
        raise CheckpointError(f"the tensors of '{path}' are damaged or missing: their checksum differs; {way}")
    return state  # type: ignore[no-any-return]


def load(path: Path, method: Method, optimizer: torch.optim.Optimizer) -> int:
    """Loads a checkpoint into model and optimiser; returns its step.

    Raises:
        CheckpointError: the file is damaged, or belongs to another model or other losses.
    """
    step: int = read(path)["step"]
    try:
        with safe_open(path / _TENSORS, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {error}; remove it and resume") from None
    if lacking := [name for name in stored if name.endswith(".step") and not _whole_moments(name, stored)]:
        raise CheckpointError(
            f"the checkpoint '{path}' lacks AdamW's moments of {lacking[0]}; remove that folder and resume"
        )
    kept = _kept(method)
    moments = {name for name in stored if name.startswith("optimizer.")}
    if different := sorted((set(stored) - moments) ^ set(kept)):
        raise CheckpointError(
            f"the checkpoint '{path}' belongs to another model or other losses: {different[0]} and "
            f"{len(different) - 1} other tensors are missing on one side; resume with the settings that wrote it"
        )
    with torch.no_grad():
        for name, tensor in kept.items():
            if tensor.shape != stored[name].shape:
                raise CheckpointError(
                    f"the checkpoint '{path}' has {name} of shape {list(stored[name].shape)}, the model has "
                    f"{list(tensor.shape)}; resume with the settings that wrote it"
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
    return step


def _whole_moments(step: str, stored: dict[str, Tensor]) -> bool:
    return not step.startswith("optimizer.") or all(f"{step.removesuffix('step')}{m}" in stored for m in _MOMENTS)


def _like(tensor: Tensor, stored: Tensor) -> Tensor:
    """A stored tensor on the device of another tensor, and sharded like it."""
    moved = stored.to(tensor.device)
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else moved
