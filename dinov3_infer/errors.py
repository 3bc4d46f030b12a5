"""The errors of this package: one base class, and for each kind the builtin that a caller would catch.

A message is one sentence: what is wrong, what was given, how to fix it.
"""

from typing import Any, get_args

__all__ = [
    "CheckpointError",
    "Dinov3Error",
    "DiskError",
    "GatedModelError",
    "ImageError",
    "InputError",
    "InputTypeError",
    "LayerError",
    "MissingFileError",
    "ModelNotFoundError",
    "OfflineError",
    "PrecisionError",
    "UnsupportedError",
    "check_choice",
    "one_line",
]

_LONGEST = 2000  # characters; names inside files can be of any length


def one_line(text: str) -> str:
    """Escape unprintable characters as `repr` does, and cut the middle of text over 2,000 characters."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Dinov3Error(Exception):
    """Base class of all errors that this package raises on purpose."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(Dinov3Error, ValueError):
    """An argument has a wrong value, shape or range."""


class InputTypeError(Dinov3Error, TypeError):
    """An argument has a type that is not supported here."""


class LayerError(Dinov3Error, IndexError):
    """The model does not have the requested layer."""


class ImageError(Dinov3Error, ValueError):
    """An image cannot be read, or its pixels may be a mistake."""


class CheckpointError(Dinov3Error, ValueError):
    """A weights file is damaged, is another kind of file, or does not fit the model."""


class ModelNotFoundError(Dinov3Error, ValueError):
    """No model has that name, or the name leads to no weights."""


class MissingFileError(Dinov3Error, FileNotFoundError):
    """There is nothing at a path."""


class GatedModelError(Dinov3Error, PermissionError):
    """The hub or a server refuses access: licence not accepted, token without the right, or link expired."""


class OfflineError(Dinov3Error, FileNotFoundError):
    """The weights are not in the cache, and they cannot be downloaded."""


class DiskError(Dinov3Error, OSError):
    """A disk is full, over quota, gone, broken or read-only; `errno` says which."""


class PrecisionError(Dinov3Error, FloatingPointError):
    """A result is not finite because its dtype cannot hold it."""


class UnsupportedError(Dinov3Error, NotImplementedError):
    """The feature exists elsewhere, but not in this package or not on this machine."""


def check_choice(name: str, value: object, kind: Any) -> None:
    """Check that `value` is one of the values of the Literal `kind`, or one of the names in `kind`.

    Raises: InputError otherwise.
    """
    known: tuple[str, ...] = get_args(kind) or tuple(kind)
    if value not in known:
        raise InputError(f"{name} is one of {', '.join(map(str, known))}; got {value!r}")
