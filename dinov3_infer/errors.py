"""One base class of errors; each kind is also the builtin that a caller would catch.

A message is one sentence: what is wrong, what was given, how to mend it.
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

_LONGEST = 2000  # characters; a name inside a file may be of any length


def one_line(text: str) -> str:
    """Text with names given by others: unprintable characters as `repr` shows them, the middle of long text cut."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Dinov3Error(Exception):
    """Base of everything that this package raises on purpose."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(Dinov3Error, ValueError):
    """An argument has a wrong value, shape or range."""


class InputTypeError(Dinov3Error, TypeError):
    """An argument is of a kind that is not taken here."""


class LayerError(Dinov3Error, IndexError):
    """A layer was asked for that the model does not have."""


class ImageError(Dinov3Error, ValueError):
    """A picture cannot be read, or its pixels cannot be told apart from a mistake."""


class CheckpointError(Dinov3Error, ValueError):
    """A weights file is damaged, is something else, or does not fit."""


class ModelNotFoundError(Dinov3Error, ValueError):
    """No model of that name, or no weights where the name leads to."""


class MissingFileError(Dinov3Error, FileNotFoundError):
    """A path leads nowhere."""


class GatedModelError(Dinov3Error, PermissionError):
    """The hub or a link refuses access: a licence to accept, a token without the right, a link that has expired."""


class OfflineError(Dinov3Error, FileNotFoundError):
    """The weights are not in the cache and the hub cannot be reached."""


class DiskError(Dinov3Error, OSError):
    """A disk is full, over a quota, gone, broken, or takes no more of a file; `errno` says which."""


class PrecisionError(Dinov3Error, FloatingPointError):
    """A result is not finite because its number format could not hold it."""


class UnsupportedError(Dinov3Error, NotImplementedError):
    """Something that exists elsewhere and not here."""


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raises InputError for a value that is none of a Literal's, or of these names."""
    known: tuple[str, ...] = get_args(kind) or tuple(kind)
    if value not in known:
        raise InputError(f"{name} is one of {', '.join(map(str, known))}; got {value!r}")
