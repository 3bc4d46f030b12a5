"""The base of objects that are fitted to the features of one backbone."""

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

_KEY = "dinov3_infer"  # key of our entry in the metadata of the file
_WHOLE = ("targets",)  # tensors that hold class numbers


@dataclass(repr=False, eq=False)
class Fitted:
    """Base of all objects with `fit` and `predict`.  Constructor fields are settings; `fit` sets `tensors`."""

    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)
    options: dict[str, Any] = field(default_factory=dict, init=False)  # settings of its features, as given to `save`

    names: ClassVar[tuple[str, ...]] = ()  # names of the tensors; the last axis of the first is the feature width
    shapes: ClassVar[tuple[str, ...]] = ()  # "K C": one letter per axis, equal letters for equal lengths; "1" is 1

    def save(self, path: str | os.PathLike[str], backbone: "Backbone", **options: Any) -> Path:
        """Writes one safetensors file with the tensors and, as JSON, the settings and the fingerprint of the backbone.

        `options`: settings of the features, such as pooling="mean", size=448.  `load` restores them in `.options`, to
        make features in the same way: `bb.embed(images, **probe.options)`.

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
            raise InputError(
                f"options are numbers, strings and lists of these: {error}; leave the others out"
            ) from None
        target = Path(path).expanduser()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        with whole(target) as beside:
            save_file(tensors, beside, {_KEY: stored})
        self.options = dict(options)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], backbone: "Backbone") -> Self:
        """Loads a file that `save` wrote for this class or a derived one, on the CPU.

        Raises: MissingFileError if there is no file; CheckpointError for a file of another kind or class, for another
        backbone, and for tensors or settings that the class cannot have.
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
        except OSError as error:
            raise CheckpointError(f"cannot read '{path}' ({error.strerror}); check it and its permissions") from None
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
        ):  # RuntimeError: JSON that is too deep
            raise CheckpointError(f"'{path}' was not written by save(), or is damaged; fit and save again") from None
        if found is None:
            raise CheckpointError(
                f"'{path}' holds a {stored['kind']}, not a {cls.__name__}; use {stored['kind']}.load()"
            )
        if set(tensors) != set(found.names):
            raise CheckpointError(f"'{path}' holds the tensors {sorted(tensors)}, not {sorted(found.names)}; fit again")
        if made_with != backbone.fingerprint():
            raise CheckpointError(
                f"'{path}' was fitted to features of other weights ({model or 'a model without a name'}, "
                f"{str(made_with)[:12]}); load that backbone, or fit again with this one"
            )
        if wrong := found._misfit(tensors):
            raise CheckpointError(f"'{path}' holds {wrong}, which save() does not write; fit and save again")
        found.tensors, found.options = tensors, options
        return found

    def _misfit(self, tensors: dict[str, Tensor]) -> str:
        """The first part of a file that an instance of this class cannot have, or ""."""
        for one in fields(self):
            if one.init and not _is_like(getattr(self, one.name), one.default):
                return f"{one.name}={getattr(self, one.name)!r}"
        known = getattr(self, "classes_", None)  # of a probe
        classes = 0 if known is None else len(known)
        sides = {"1": 1} | ({} if known is None else {"K": classes})
        for name, letters in zip(self.names, map(str.split, self.shapes), strict=True):
            tensor, expected = tensors[name], torch.int64 if name in _WHOLE else torch.float32
            fits = len(letters) == tensor.ndim and all(
                sides.setdefault(letter, side) == side > 0 for letter, side in zip(letters, tensor.shape, strict=True)
            )
            if not fits or tensor.dtype != expected:
                shape = ", ".join(str(sides.get(letter, letter)) for letter in letters)
                return f"{name} as {tensor.dtype} {list(tensor.shape)} instead of {expected} [{shape}]"
            low, high = (float(number) for number in tensor.aminmax())
            if not (math.isfinite(low) and math.isfinite(high)) or (name in _WHOLE and not 0 <= low <= high < classes):
                return f"{name} from {low:g} to {high:g}"
        if "D" in sides and sides["D"] * sides["H"] != sides["C"]:
            return f"{sides['H']} heads of {sides['D']} channels for features of {sides['C']}"
        return ""

    def to(self, device: str | torch.device) -> Self:
        """Moves the tensors to a device; features are moved there when they are used."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self

    def settings(self) -> dict[str, Any]:
        """The constructor arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def _stored(self) -> dict[str, Any]:
        """Further content of the file, which `_restore` reads."""
        return {}

    def _restore(self, stored: dict[str, Any]) -> None:
        pass

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({settings}){'' if self.tensors else ', not fitted'}"

    def _check(self, width: int | None = None) -> None:
        """Raises InputError before `fit`, and for features of another width."""
        if not self.tensors:
            raise InputError(f"this {type(self).__name__} is not fitted; call fit() first")
        known = self.tensors[self.names[0]].shape[-1]
        if width not in (None, known):
            raise InputError(
                f"this {type(self).__name__} was fitted to features of width {known}, got {width}; "
                "use the same model, layers and pooling"
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
    """Minimises `loss` with AdamW, in place, over tensors of any shape, each with its weight decay.

    The learning rate warms up linearly over the share `warm_up` of the steps and follows a cosine to 0.  `loss` is
    called once per step, draws its examples and returns a scalar [].
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
        with torch.device(value.device):  # torch 2.8 counts the steps on the default device
            solver.step()


def _is_like(value: object, default: object) -> bool:
    """Whether a setting from a file has the type of its default."""
    if default is None:
        return value is None or _is_like(value, 0.0)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_like(one, default[0]) for one in value)
    if isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(value) < 1e30  # never of NaN
    return type(value) is type(default) and (not isinstance(value, int) or abs(value) < 2**63)


def _derived(cls: type[Any]) -> list[type[Any]]:
    return [cls, *(deeper for one in cls.__subclasses__() for deeper in _derived(one))]
