"""Fields of a configuration: their text in `--help`, and the values that they take."""

import dataclasses
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from ..errors import InputError, check_choice

__all__ = ["Count", "CountFrom0", "Pair", "Positive", "Share", "Shares", "Weight", "check_fields", "option"]

Pair = tuple[float, float]
T = TypeVar("T")


def above_0(value: float) -> str | None:
    """The fault of a value that is not above 0, as the end of a sentence; None for a good value."""
    return None if value > 0 else f"is {value}; give a value above 0"


def not_below_0(value: float) -> str | None:
    """The fault of a value below 0, as the end of a sentence; None for a good value."""
    return None if value >= 0 else f"is {value}; give 0 or more"


def share(value: float) -> str | None:
    """The fault of a value outside 0 to 1, as the end of a sentence; None for a good value."""
    return None if 0 <= value <= 1 else f"is {value}; give a value from 0 to 1"


def shares(value: Pair) -> str | None:
    """The fault of a pair that is not a range inside 0 to 1, as the end of a sentence; None for a good pair."""
    low, high = value
    return None if 0 < low <= high <= 1 else f"is a range of shares, got {low} to {high}; give 0 < low <= high <= 1"


Count = Annotated[int, above_0]
CountFrom0 = Annotated[int, not_below_0]
Positive = Annotated[float, above_0]
Weight = Annotated[float, not_below_0]
Share = Annotated[float, share]
Shares = Annotated[Pair, shares]


def option(default: T, text: str = "", heading: str = "") -> T:
    """A field of a configuration.

    Args:
        default: the value of the field when none is given.
        text: explanation for `--help`.
        heading: title of a group in `--help`; the group holds this field and those after it, up to the next heading.
    """
    return dataclasses.field(default=default, metadata={"text": text, "heading": heading})


def check_fields(config: Any) -> None:
    """Checks the type and the range of every field of a configuration, a dataclass.

    Raises:
        InputError: a value has another type than its field, or lies outside the values that the field takes.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if get_origin(field.type) is Literal:
            check_choice(field.name, value, field.type)
        elif expected := _mismatch(value, field.type):
            raise InputError(f"{field.name} is {expected}; got {value!r}")
        for rule in getattr(field.type, "__metadata__", ()):
            if fault := rule(value):
                raise InputError(f"{field.name} {fault}")


def _mismatch(value: Any, kind: Any) -> str | None:
    """The type that a value should have, if it has another one."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        count = None if rest == [Ellipsis] else 1 + len(rest)
        wrong = not isinstance(value, tuple | list) or count not in (None, len(value))
        wrong = wrong or any(_mismatch(v, first) for v in value)
        return f"{_mismatch(None, first)}, {count or 'any number'} of them" if wrong else None
    known: dict[Any, tuple[bool, str]] = {
        bool: (isinstance(value, bool), "true or false"),
        int: (isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
        float: (isinstance(value, Real) and not isinstance(value, bool), "a number"),
        str: (isinstance(value, str), "a text"),
    }
    return None if known[kind][0] else known[kind][1]
