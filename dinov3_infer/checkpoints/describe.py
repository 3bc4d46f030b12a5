"""What a checkpoint is, decided in one place before a tensor is read: layout, network, model of the zoo, transform."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, InputError, UnsupportedError
from ..images.preprocess import Preprocess
from ..zoo import MODELS, OWN, Config, ModelInfo, Style, find_architecture, preprocess_of
from .architecture import architecture, rows_like
from .layouts import LayoutName
from .reading import CONFIG, PROCESSOR, Checkpoint, TensorsInMemory
from .recognise import Stored, layout_hint, recognise

__all__ = ["Description", "describe", "identity", "open_module", "transform_of"]

log = logging.getLogger("dinov3_infer")


@dataclass(frozen=True)
class Description:
    """What was found out about a checkpoint."""

    path: str
    stored: Stored  # its tensors
    config: Config
    info: ModelInfo | None  # the row of the zoo, with the licence; None for an architecture of one's own
    preprocess: Preprocess
    rope_periods: Any  # what our block of config.json says of them, if anything


def describe(
    checkpoint: Checkpoint,
    *,
    layout: LayoutName | None = None,
    expected: ModelInfo | None = None,
    preprocessing: Style | None = None,
) -> Description:
    """What a checkpoint is.

    `expected` is what the caller asked for: a file of another size is refused with both names.

    Raises: CheckpointError for tensors and configs that do not fit, UnsupportedError for networks that are not here,
    InputError for a `preprocessing` that this model does not have.
    """
    stored = recognise(checkpoint, layout or checkpoint.layout)
    like = find_architecture(str(checkpoint.config.get("architecture"))) or expected
    try:
        config, note = architecture(stored, checkpoint, expected, like)
    except (CheckpointError, InputError) as error:
        raise CheckpointError(f"'{checkpoint.path}' does not fit: {error}") from None
    except UnsupportedError as error:
        raise UnsupportedError(f"'{checkpoint.path}': {error}") from None
    if note:
        log.warning("%s: %s", checkpoint.path, note)
    rows = rows_like(config)
    info = expected or identity(rows, checkpoint)
    periods = _our_block(checkpoint).get("rope_periods")
    preprocess = _with_stored_statistics(transform_of(config, info, preprocessing), checkpoint)
    return Description(checkpoint.path, stored, config, info, preprocess, periods)


def identity(rows: Sequence[ModelInfo], checkpoint: Checkpoint) -> ModelInfo | None:
    """Of rows with one architecture that which config.json or the file's name speaks of, else the first.

    Of weights that began as random ones, as config.json says, it has no licence.
    """
    ours, timm = _our_block(checkpoint), checkpoint.config.get("pretrained_cfg")
    stem, tag = Path(checkpoint.path).stem, f".{timm.get('tag')}" if isinstance(timm, dict) else "."
    if ours.get("from_scratch") is True:
        rows = [replace(row, licence=OWN) for row in rows]
    named = (
        row
        for row in rows
        if row.name == ours.get("name") or (row.timm_id or "").endswith(tag) or row.meta_file == stem
    )
    return next(named, rows[0] if rows else None)


def _our_block(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What `save_pretrained` writes into the configs of others."""
    ours = checkpoint.config.get("dinov3_infer")
    return ours if isinstance(ours, dict) else {}


def transform_of(config: Config, info: ModelInfo | None, style: Style | None = None) -> Preprocess:
    """That of a row; for an architecture of one's own ImageNet's mean and std, and 16 patches of a ViT a side."""
    if info is not None:
        return preprocess_of(info, style)
    if style is not None:
        raise InputError(
            f"preprocessing={style!r} needs a known architecture, and this model has its own; leave it out"
        )
    first = next(iter(MODELS.values()))
    return Preprocess(first.mean, first.std, config.patch_size, size=16 * min(16, config.patch_size))


def _with_stored_statistics(transform: Preprocess, checkpoint: Checkpoint) -> Preprocess:
    """The same with mean and std of what lies beside the weights, where that says so."""
    timm = checkpoint.config.get("pretrained_cfg")
    sources = (checkpoint.processor, timm if isinstance(timm, Mapping) else {}, checkpoint.config)
    for source in sources:
        mean, std = source.get("image_mean", source.get("mean")), source.get("image_std", source.get("std"))
        if isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) == len(std) == 3:
            try:
                return replace(transform, mean=tuple(mean), std=tuple(std))
            except InputError as error:
                file = PROCESSOR if source is checkpoint.processor else CONFIG
                raise CheckpointError(f"{file} of '{checkpoint.path}' is wrong: {error}; mend it") from None
    return transform


def open_module(model: nn.Module) -> Checkpoint:
    """A live module of transformers, timm or Meta as a checkpoint: its tensors, and what it knows besides."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    stated = [c.to_dict() for c in configs if hasattr(c, "to_dict") and layout_hint(c.to_dict()) == "hf"]
    origins = {type(module).__module__.split(".")[0] for module in model.modules()}
    return Checkpoint(
        f"a live {type(model).__name__}",
        TensorsInMemory(model.state_dict(keep_vars=True)),
        config=stated[0] if stated else _timm_config(model),
        layout="timm" if "timm" in origins else "hf" if "transformers" in origins else None,
        known={} if stated else _settings(model),
    )


def _settings(model: nn.Module) -> dict[str, Any]:
    """What a timm or Meta module knows and its tensors do not show."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith("blocks.0.attn") and isinstance(getattr(module, "num_heads", None), int):
            found["num_heads"] = module.num_heads
        if re.search(r"blocks\.0\.norm1$|stages\.0\.(blocks\.)?0\.norm$", name) and isinstance(
            getattr(module, "eps", None), float
        ):
            found["norm_eps"] = module.eps
    return found


def _timm_config(model: nn.Module) -> dict[str, Any]:
    """timm's config.json of a live module, as far as it knows which weights it holds."""
    cfg: Any = next((c for module in model.modules() if (c := getattr(module, "pretrained_cfg", None))), {})
    return {"pretrained_cfg": dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg)} if cfg else {}
