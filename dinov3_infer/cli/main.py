"""Parses the command line, runs one command, and turns an exception into one line and an exit status."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from importlib import import_module
from typing import TextIO

from ..errors import Dinov3Error
from ..system import disk_error
from .parser import parse

__all__ = ["FAILED", "INTERRUPTED", "OK", "SKIPPED", "main", "printable", "say", "tell"]

_quiet = ContextVar("quiet", default=False)  # whether the running command prints errors only
OK, FAILED, SKIPPED, INTERRUPTED = 0, 1, 3, 130  # argparse exits with 2
_TYPED = {  # Python terms in the package's errors -> the same on the command line
    "list_models()": "'dinov3-infer models'",
    "weights=PATH": "the path of a file",
    "give it with weights=": "give it with --weights",
    "pass num_heads=": "give it to 'dinov3-infer convert' with --num-heads",
    "or overwrite it": "or --overwrite",
    ", and extract_features(fit='native') goes there by itself": "",
}
_OPTION = re.compile(
    r"\b(size|fit|dtype)=(?:'(\w+)'|torch\.(\w+)|(?=[\s,]|$))"
)  # size=, fit='crop', dtype=torch.float16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 success, 1 failure, 2 wrong usage, 3 success with skipped inputs,
    130 interrupted.  Raises nothing; an exception becomes one line on stderr.

    Args:
        argv: words after `dinov3-infer`; None for those of this process.
    """
    handler, debug = _Lines(), False
    log = logging.getLogger("dinov3_infer")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if debug := args.debug:
            log.setLevel(logging.DEBUG)
        elif args.verbose:
            log.setLevel(logging.INFO)
        elif args.quiet:
            log.setLevel(logging.ERROR)
        _quiet.set(args.quiet)
        module = args.command.split()[-1]  # "search" of "embed search"
        status = import_module(f".{module}", __package__).run(args)
        sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
        return int(status)
    except SystemExit as ended:  # after help, version and wrong usage
        return int(ended.code or 0)
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        _write(_line(f"error: {_sentence(error)}"), sys.stderr)
        return FAILED
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _sentence(error: Exception) -> str:
    if isinstance(error, Dinov3Error):
        text = str(error)
        for python, typed in _TYPED.items():
            text = text.replace(python, typed)
        return _OPTION.sub(lambda found: " ".join(filter(None, (f"--{found[1]}", found[2], found[3]))), text)
    if (problem := disk_error(error)) is not None:
        return str(problem)
    if isinstance(error, OSError) and error.strerror:
        at = f" '{os.fsdecode(error.filename)}'" if isinstance(error.filename, (str, bytes)) else ""
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{at}"
    if type(error).__name__ == "OutOfMemoryError":
        return "the device ran out of memory; give a smaller --size or --batch-size, or --device cpu"
    return (
        f"unexpected {type(error).__name__}, a bug in dinov3-infer; please report it with the output of --debug and of "
        "'dinov3-infer doctor'"
    )


def printable(text: str) -> str:
    """The text on one line, with control characters and invalid UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def tell(text: str) -> None:
    """Prints a message to stderr, unless the command is quiet."""
    if not _quiet.get():
        _write(_line(text), sys.stderr)


def _line(text: str) -> str:
    return f"dinov3-infer: {printable(text)}"


def say(*columns: str) -> None:
    """Prints a line of the result to stdout, with tabs between columns."""
    _write("\t".join(map(printable, columns)), sys.stdout)


def _write(line: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"  # which may lack characters of a file name
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


class _Lines(logging.Handler):
    """Prints the log of the package to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        text = (
            record.getMessage()
            if record.levelno == logging.INFO
            else f"{record.levelname.lower()}: {record.getMessage()}"
        )
        bars = sys.modules.get("tqdm")  # a progress bar moves out of the way
        with bars.tqdm.external_write_mode(sys.stderr) if bars else nullcontext():
            _write(_line(text), sys.stderr)
