"""The command line of the trainer, made from the fields of TrainConfig."""

import argparse
import dataclasses
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import Dinov3Error, InputError
from .config import PRESETS, TrainConfig
from .dry_run import dry_run
from .loop import train

__all__ = ["main", "parse"]


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dinov3-infer train", description="Trains a backbone on pictures without labels.", allow_abbrev=False,
        usage="dinov3-infer train --data SRC [SRC ...] --model MODEL --out RUN [options]",
        epilog="In brackets the default of preset 'adapt'.  'v3' marks the value of DINOv3's published configurations. "
        "An option that ends in -share is a part of the run, from 0 to 1, unless it says of what.  Which recipe for "
        "what: examples/configs of the repository has small_folder (images of another kind, one GPU), short_cpu (the "
        "same, 38 minutes on one core for a ViT-S/14), nano (a distillation), and as published dino_v1, dinov2 and the "
        "stages of DINOv3's 7B: dinov3_pretrain, dinov3_gram, dinov3_high_resolution.",
    )  # fmt: skip
    found.add_argument(
        "--preset", choices=list(PRESETS),
        help="what the defaults are (adapt).  adapt: released weights go on with images of another kind.  dinov3: "
        "its recipe of a ViT-L from random weights.  distill: a small backbone from a large one, --teacher",
    )  # fmt: skip
    found.add_argument("--config", metavar="FILE", help="settings as TOML; those of the command line come on top")
    found.add_argument("--resume", action="store_true", help="go on with the run in --out")
    found.add_argument("--dry-run", action="store_true", help="say what would be done")
    kinds = get_type_hints(TrainConfig)
    for name, field in FIELDS.items():
        if heading := field.metadata.get("heading"):
            group = found.add_argument_group(heading)
        kind, default, text = kinds[name], field.default, field.metadata.get("text", "")
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        options: dict[str, Any] = dict(dest=name, default=argparse.SUPPRESS)
        options["help"] = f"{text} ({shown})".strip().replace("%", "%%") if shown else text
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple or get_origin(kind) is tuple:
            first, *rest = get_args(kind)
            several = rest == [Ellipsis]
            options |= dict(type=first, nargs="+" if several else 1 + len(rest), metavar="X")
        elif choices := get_args(kind):
            options["choices"] = choices
        else:
            options |= dict(type=kind, metavar={int: "N", float: "X"}.get(kind, "TEXT"))
        group.add_argument(_flag(name), **options)
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """(configuration, the rest): the preset, then the file, then the command line."""
    given = parser().parse_args(argv)
    settings = {name: value for name, value in vars(given).items() if name in FIELDS}
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
        text = path.read_text(encoding="utf-8-sig")
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
        print(f"dinov3-infer: error: {_typed(str(error))}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _typed(sentence: str) -> str:
    """Settings as one types them here: koleo_weight=0 is --koleo-weight 0."""
    names = "|".join(name for name in FIELDS if "_" in name)
    sentence = re.sub(rf"\b({'|'.join(FIELDS)})='?([\w.]+)'?", lambda found: f"{_flag(found[1])} {found[2]}", sentence)
    return re.sub(rf"(?<![\w'/-])({names})\b", lambda found: _flag(found[1]), sentence)
