"""Parsers of option values: sizes, counts, points."""

import argparse
import re


def size(text: str) -> int | tuple[int, int] | str:
    """A side, (height, width), or "own".  Raises: ArgumentTypeError."""
    if text == "own":
        return text
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"a size is SIDE or HEIGHTxWIDTH in pixels, or own; got {text!r}")
    sides = [int(side) for side in text.split("x")]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def pixels(text: str) -> int | tuple[int, int]:
    """A side, or (height, width).  Raises: ArgumentTypeError."""
    found = size(text)
    if isinstance(found, str):
        raise argparse.ArgumentTypeError(f"a size is SIDE or HEIGHTxWIDTH in pixels; got {text!r}")
    return found


def numbers(text: str) -> list[int]:
    """Integers with commas between them.  Raises: ArgumentTypeError."""
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"give whole numbers with commas between them, as in -1,-4; got {text!r}")
    return [int(number) for number in text.split(",")]


def point(text: str) -> tuple[float, float]:
    """(x, y) in pixels.  Raises: ArgumentTypeError."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a point is X,Y in pixels from the upper left corner; got {text!r}") from None
    return x, y


def count(text: str) -> int:
    """An integer of at least 1.  Raises: ArgumentTypeError."""
    return whole(text, 1)


def whole(text: str, least: int = 0) -> int:
    """An integer of at least `least`.  Raises: ArgumentTypeError."""
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"give a whole number of at least {least}; got {text!r}")
    return int(text)
