"""An argument parser that suggests the closest command, option or choice."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Parser", "did_you_mean", "meant"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text "; did you mean 'x'?" for the closest name, or "" if none is close."""
    names = list(known)
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    near = near or [name for name in names if word.lower() in name.split()]  # "search" in "embed search"
    return f"; did you mean '{near[0]}'?" if near else ""


def meant(word: str, known: Iterable[str]) -> str:
    """The command closest to a word that is no existing file; "" if none is close."""
    found = [] if os.path.exists(word) else difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return found[0] if found else ""


class Parser(argparse.ArgumentParser):
    """Suggests commands, options and choices, and reports an unknown option before a missing one.

    It accepts `--layers -1,-4`, as argparse does from Python 3.14 on.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse arguments as argparse does; exits with a suggestion for a misspelled option."""
        known = self._option_string_actions
        for word in args or ():
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # the rest are no options, or belong to a command
            name = word.partition("=")[0]
            if name in known or not name.startswith("--") or "-" not in self.prefix_chars:
                continue
            if hint := did_you_mean(name, (one for one in known if one.startswith("--"))):
                self.error(f"there is no option '{name}'{hint}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            choices = list(map(str, action.choices or ()))
            hint = did_you_mean(str(value), choices)
            if not hint:
                raise
            command = action.metavar.lower() if self._subparsers is not None and isinstance(action.metavar, str) else ""
            said = f"there is no {command}{' ' if command else ''}{value!r}{hint} (it is one of {', '.join(choices)})"
            raise argparse.ArgumentError(None if command else action, said) from error
