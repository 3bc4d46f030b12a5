"""The command line of the trainer, made from the fields of TrainConfig."""

import argparse
import dataclasses
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from ..errors import Dinov3Error, InputError
from .config import PRESETS, TrainConfig
from .loop import train
from .plan import dry_run

__all__ = ["main", "parse"]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dinov3-infer train", description="Trains a backbone on pictures without labels.", allow_abbrev=False
    )
    found.add_argument("--preset", choices=list(PRESETS), help="what the defaults are (adapt)")
    found.add_argument("--config", metavar="FILE", help="settings as TOML; those of the command line come on top")
    found.add_argument("--resume", action="store_true", help="go on with the run in --out")
    found.add_argument("--dry-run", action="store_true", help="say what would be done")
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = dict(dest=field.name, default=argparse.SUPPRESS)
        if field.type is bool:
            found.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field.type is tuple or get_origin(field.type) is tuple:
            kind, *rest = get_args(field.type)
            found.add_argument(flag, type=kind, nargs="+" if rest == [Ellipsis] else 1 + len(rest), **options)
        elif choices := get_args(field.type):
            found.add_argument(flag, choices=choices, **options)
        else:
            found.add_argument(flag, type=field.type, **options)
    return found


def parse(argv: Sequence[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """(configuration, the rest): the preset, then the file, then the command line."""
    given = parser().parse_args(argv)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = {name: value for name, value in vars(given).items() if name in known}
    below: dict[str, Any] = {}
    if given.resume:
        if given.preset or given.config:
            raise InputError("a resumed run has its settings in its folder; leave --preset and --config out")
        below = _read(Path(settings.get("out", ".")).expanduser() / "config.json") | {"preset": "adapt"}
    elif given.config:
        below = _read(Path(given.config).expanduser())
    preset = given.preset or below.get("preset", "adapt")
    merged = {name: tuple(v) if isinstance(v, list) else v for name, v in (below | settings).items()}
    merged.pop("preset", None)
    return TrainConfig.preset(preset, **merged), given


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"the settings '{path}' cannot be read: {error}") from None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        config, given = parse(argv)
        if given.dry_run:
            print(json.dumps(dry_run(config), indent=1))  # noqa: T201
        else:
            train(config, resume=given.resume)
    except Dinov3Error as error:
        print(f"dinov3-infer: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0
