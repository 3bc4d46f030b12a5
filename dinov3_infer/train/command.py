"""The command line of the trainer: one flag for each field of `TrainConfig`."""

import argparse
import dataclasses
import json
import logging
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

from ..errors import Dinov3Error, InputError
from ..typos import Parser
from .config import PRESETS, TrainConfig
from .dry_run import dry_run
from .loop import train

__all__ = ["main", "parse"]


# The settings that most runs change; they come first in the help.
COMMON = ("data", "model", "out", "steps", "batch_size", "global_px", "workers", "device", "precision", "seed")
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def parser() -> argparse.ArgumentParser:
    """The parser of `dinov3-infer train`: a flag for each field of `TrainConfig`, and the flags of a run."""
    found = Parser(
        prog="dinov3-infer train", allow_abbrev=False,
        description="Train a backbone on images without labels: adapt a released one, distil one, or start from random "
        "weights.",
        usage="dinov3-infer train --data SRC [SRC ...] --model MODEL --out RUN [options]",
        epilog="The defaults are those of --preset adapt.  'as DINOv3' means that DINOv3's published configurations "
        "have the same value; FINO is the fine-tuning branch of its repository.  Options that end in -share are shares "
        "from 0 to 1.  The folder examples/configs of our repository has complete settings for --config: small_folder "
        "(adapt to your images on one GPU), short_cpu (the same for a ViT-S/14 in 38 minutes on one CPU core), nano "
        "(distillation), and the published recipes dino_v1, dinov2, dinov3_pretrain, dinov3_gram and "
        "dinov3_high_resolution (the last three are the stages of DINOv3's 7B).",
    )  # fmt: skip
    found.add_argument(
        "--preset", choices=list(PRESETS),
        help="set of defaults: adapt continues the training of a released backbone on your images; dinov3 trains a "
        "ViT-L from random weights as DINOv3 does; distill trains a small backbone from --teacher (default: adapt)",
    )  # fmt: skip
    found.add_argument("--config", metavar="FILE", help="TOML file with settings; flags override it")
    found.add_argument("--resume", action="store_true", help="continue the run in --out")
    found.add_argument(
        "--dry-run", action="store_true", help="print the settings and the memory that they need; do not train"
    )
    found.add_argument("-q", "--quiet", action="store_true", help="print warnings and errors only, and no progress bar")
    common, group = found.add_argument_group("most used"), None
    for name in COMMON:
        _add(common, name)
    for name, field in FIELDS.items():
        if heading := field.metadata.get("heading"):
            group = found.add_argument_group(heading)
        if name not in COMMON and group is not None:
            _add(group, name)
    return found


def _add(group: Any, name: str) -> None:
    """Adds the flag of a field, with its explanation and its default."""
    field, kind = FIELDS[name], get_type_hints(TrainConfig)[name]
    default, text = field.default, _as_flags(field.metadata["text"])
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    options: dict[str, Any] = dict(dest=name, default=argparse.SUPPRESS)
    options["help"] = f"{text} (default: {shown})".replace("%", "%%") if shown else text
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str] | None = None) -> tuple[TrainConfig, argparse.Namespace]:
    """Reads the settings of a run: the preset, overridden by the file, overridden by the flags.

    Args:
        argv: words of the command line; None for those of this process.

    Returns:
        The settings, and the parsed flags of the run (`resume`, `dry_run`, `quiet`).

    Raises:
        InputError: a setting is wrong, or the file cannot be read.
        SystemExit: after --help, and for wrong usage.

    Example:
        >>> config, flags = parse(["--data", "photos/", "--model", "vits16", "--out", "run"])
    """
    given = parser().parse_args(argv)
    settings = {name: value for name, value in vars(given).items() if name in FIELDS}
    below: dict[str, Any] = {}
    if given.resume:
        if given.preset or given.config:
            raise InputError("--resume takes the settings from the folder of the run; remove --preset and --config")
        below = _resumed(Path(settings.get("out", ".")).expanduser() / "config.json")
    elif given.config:
        below = _read(Path(given.config).expanduser())
    preset = given.preset or below.get("preset", "adapt")
    merged = {name: _tuple(value) for name, value in (below | settings).items()}
    merged.pop("preset", None)
    return TrainConfig.preset(preset, **merged), given


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        found: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it holds no table of settings")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the settings file '{path}' cannot be read: {error}") from None
    return found


def _resumed(path: Path) -> dict[str, Any]:
    """The settings of a run in its config.json.  Raises InputError if they are damaged."""
    found = _read(path) | {"preset": "adapt"}
    try:
        TrainConfig.preset(**{name.replace("preset", "name"): _tuple(value) for name, value in found.items()})
    except InputError as error:
        raise InputError(
            f"the settings file '{path}' is damaged: {error}; each checkpoint has a copy in its state.json"
        ) from None
    return found


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dinov3-infer train` and returns its exit status: 0 for success, 2 for an error, which is printed."""
    try:
        config, given = parse(argv)
        if given.dry_run:
            print(json.dumps(dry_run(config), indent=1))  # noqa: T201
        else:
            with _told(given.quiet):
                train(config, resume=given.resume, progress=False if given.quiet else None)
    except Dinov3Error as error:
        print(f"dinov3-infer: error: {_as_flags(str(error))}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


@contextmanager
def _told(quiet: bool) -> Iterator[None]:
    """Prints the log of a run above its progress bar; the command `dinov3-infer` has installed a handler already."""
    log, handler = logging.getLogger("dinov3_infer"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dinov3-infer: %(message)s"))
    level, added = log.level, not log.handlers
    if added:
        log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else min(level or logging.INFO, logging.INFO))
    try:
        with logging_redirect_tqdm([log]) if added else nullcontext():
            yield
    finally:
        log.setLevel(level)
        if added:
            log.removeHandler(handler)


def _as_flags(sentence: str) -> str:
    """A sentence with settings as flags: "koleo_weight=0" becomes "--koleo-weight 0"."""
    names = "|".join(name for name in FIELDS if "_" in name)
    sentence = re.sub(rf"\b({'|'.join(FIELDS)})='?([\w.]+)'?", lambda found: f"{_flag(found[1])} {found[2]}", sentence)
    return re.sub(rf"(?<![\w'/-])({names})\b", lambda found: _flag(found[1]), sentence)
