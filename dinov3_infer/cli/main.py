"""Parses, runs one command, and turns whatever goes wrong into one line and an exit status."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TextIO

from ..errors import Dinov3Error
from .parser import make_parser

__all__ = ["FAILED", "INTERRUPTED", "OK", "SKIPPED", "main", "printable", "say", "tell"]

OK, FAILED, SKIPPED, INTERRUPTED = 0, 1, 3, 130  # argparse ends with 2
_AS_OPTIONS = tuple(  # what an error of the package says for Python, as one types it here
    (re.compile(python), typed)
    for python, typed in (
        (r"\blist_models\(\)", "'dinov3-infer models'"),
        (r"\bweights=PATH\b", "the path of a file"),
        (r"\bor overwrite it\b", "or --overwrite"),
        (r", and extract_features\(fit='native'\) goes there by itself", ""),
        (r"\bfit='(\w+)'", r"--fit \1"),
        (r"\bsize=(?=[\s,]|$)", "--size"),
        (r"\bdtype=torch\.(\w+)", r"--dtype \1"),
    )
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status; nothing is raised."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        trains = given[:1] == ["train"]  # which reads its own options, so that the parser needs no torch
        arguments = make_parser().parse_args(given[:1] if trains else _joined(given))
        arguments.rest = given[1:]
    except SystemExit as ended:  # help, version, wrong usage
        return int(ended.code or 0)
    handler = _Lines()
    log = logging.getLogger("dinov3_infer")
    debug = getattr(arguments, "debug", False)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        module = arguments.command.split()[-1]  # of "embed search" search
        status: int = import_module(f".{module}", __package__).run(arguments)
        sys.stdout.flush()  # a closed pipe shows here, not when Python ends
        return status
    except SystemExit as ended:  # of the trainer's own options
        return int(ended.code or 0)
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        tell(f"error: {_sentence(error)}")
        return FAILED
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _joined(argv: list[str]) -> list[str]:
    """`--layers -1,-4` as `--layers=-1,-4`: argparse takes a value that begins with a minus for an option."""
    found: list[str] = []
    for text in argv:
        if found and found[-1] in ("--layer", "--layers", "--point") and re.match(r"-[\d.]", text):
            found[-1] += f"={text}"
        else:
            found.append(text)
    return found


def _sentence(error: Exception) -> str:
    if isinstance(error, Dinov3Error):
        text = str(error)
        for python, typed in _AS_OPTIONS:
            text = python.sub(typed, text)
        return text
    if isinstance(error, OSError) and error.strerror:
        at = f" '{os.fsdecode(error.filename)}'" if isinstance(error.filename, (str, bytes)) else ""
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{at}"
    if type(error).__name__ == "OutOfMemoryError":
        return "the memory of the device is too small; give a smaller --size or --batch-size, or --device cpu"
    return (
        f"{type(error).__name__} where none should be: this is a fault of dinov3-infer; please report it with what "
        "--debug shows and what dinov3-infer doctor prints"
    )


def printable(text: str) -> str:
    """The text on one line, without control characters and with names that are not UTF-8 spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def tell(text: str) -> None:
    """A line for people, on stderr."""
    _write(f"dinov3-infer: {printable(text)}", sys.stderr)


def say(*columns: str) -> None:
    """A line of the result, on stdout, with tabs between columns."""
    _write("\t".join(map(printable, columns)), sys.stdout)


def _write(line: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"  # which may lack letters that a name has
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


class _Lines(logging.Handler):
    """What the package logs, as lines for people."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(
            f"{record.levelname.lower()}: {record.getMessage()}"
            if record.levelno != logging.INFO
            else record.getMessage()
        )
