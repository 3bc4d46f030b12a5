"""What is fitted to the features of one backbone, and is of no use with those of another."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, InputError, MissingFileError
from ..system import whole

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["Fitted", "descend"]

_KEY = "dinov3_infer"  # of our entry in the metadata of the file


@dataclass(repr=False, eq=False)
class Fitted:
    """Base of all that has `fit` and `predict`.  Fields that a constructor takes are settings; `fit` sets `tensors`."""

    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)
    options: dict[str, Any] = field(default_factory=dict, init=False)  # how its features were made, as given to `save`

    names: ClassVar[tuple[str, ...]] = ()  # of the tensors; the first has the width of the features as its last axis

    def save(self, path: str | os.PathLike[str], backbone: "Backbone", **options: Any) -> Path:
        """Writes one safetensors file: the tensors, and as JSON the settings and the fingerprint of the backbone.

        `options`: how the features were made, such as pooling="mean", size=448; after loading they are in `.options`,
        to make others in the same way: `bb.embed(pictures, **probe.options)`.

        Raises: InputError before `fit`, and for options that JSON cannot hold.
        """
        self._check()
        try:
            stored = json.dumps(
                dict(
                    kind=type(self).__name__, settings=self.settings(), options=options,
                    backbone=backbone.fingerprint(), model=backbone.info.name if backbone.info else None,
                    **self._stored(),
                )
            )  # fmt: skip
        except TypeError as error:
            raise InputError(f"options are numbers, words and lists of these: {error}; leave the others out") from None
        target = Path(path).expanduser()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        with whole(target) as beside:
            save_file(tensors, beside, {_KEY: stored})
        self.options = dict(options)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], backbone: "Backbone") -> Self:
        """What `save` wrote, of this class or one derived from it, on the CPU.

        Raises: MissingFileError; CheckpointError for another file, another class, or features of another backbone.
        """
        if not os.path.isfile(path):
            raise MissingFileError(f"no file at '{os.path.abspath(path)}'; check the path")
        try:
            with safe_open(path, "pt") as file:
                stored = json.loads(file.metadata()[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kind = next((one for one in _derived(cls) if one.__name__ == stored["kind"]), None)
            found: Self | None = None if kind is None else kind(**stored["settings"])
            if found is not None:
                found._restore(stored)
            options, made_with, model = dict(stored["options"]), stored["backbone"], stored["model"]
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"'{path}' was not written by save(), or is damaged; fit and save anew") from None
        if found is None:
            raise CheckpointError(f"'{path}' holds a {stored['kind']}, not a {cls.__name__}; load it by that class")
        if set(tensors) != set(found.names):
            raise CheckpointError(f"'{path}' holds the tensors {sorted(tensors)}, not {sorted(found.names)}; fit anew")
        if made_with != backbone.fingerprint():
            raise CheckpointError(
                f"'{path}' was fitted to features of other weights ({model or 'an architecture of its own'}, "
                f"{str(made_with)[:12]}); load that backbone, or fit anew with this one"
            )
        found.tensors, found.options = tensors, options
        return found

    def to(self, device: str | torch.device) -> Self:
        """Moves the tensors; features are brought to them."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self

    def settings(self) -> dict[str, Any]:
        """What the constructor took."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def _stored(self) -> dict[str, Any]:
        """What the file holds beside tensors and settings; `_restore` reads it."""
        return {}

    def _restore(self, stored: dict[str, Any]) -> None:
        pass

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings}){'' if self.tensors else ', not fitted'}"

    def _check(self, width: int | None = None) -> None:
        """Raises InputError before `fit`, and for features of another width than it was fitted to."""
        if not self.tensors:
            raise InputError(f"this {type(self).__name__} has seen no examples yet; call fit() first")
        known = self.tensors[self.names[0]].shape[-1]
        if width not in (None, known):
            raise InputError(
                f"this {type(self).__name__} was fitted to features of {known} numbers, got {width}; "
                "take the same model, layers and pooling"
            )

    @property
    def _device(self) -> torch.device:
        return self.tensors[self.names[0]].device


def descend(
    tensors: Sequence[Tensor],
    decays: Sequence[float],
    steps: int,
    rate: float,
    warm_up: float,
    loss: Callable[[], Tensor],
) -> None:
    """AdamW on tensors with a weight decay for each: linear warm-up over a share of the steps, cosine decay to 0.

    `loss` is called once in each step, and draws its examples.
    """
    solver = torch.optim.AdamW(
        [{"params": [one], "weight_decay": decay} for one, decay in zip(tensors, decays, strict=True)], lr=rate
    )
    for step in range(steps):
        warm = min(1.0, (step + 1) / (warm_up * steps))
        for group in solver.param_groups:
            group["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        value = loss()
        solver.zero_grad()
        value.backward()
        solver.step()


def _derived(cls: type[Any]) -> list[type[Any]]:
    return [cls, *(deeper for one in cls.__subclasses__() for deeper in _derived(one))]
