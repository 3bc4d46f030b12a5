"""Finds the model of the zoo that weights belong to, which gives them a name, a licence and a model card.

Only names count, never shapes: the caller's name, the name of the owner's file or repository, our block in config.json,
timm's tag, or a fingerprint.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..zoo import OWN, Config, ModelInfo, row_of_repository, timm_model
from .architecture import rows_like
from .reading import Checkpoint

__all__ = ["UNNAMED", "identify", "our_block", "row_of_fingerprint"]

UNNAMED = "nothing names them"


def identify(checkpoint: Checkpoint, config: Config, expected: ModelInfo | None) -> tuple[ModelInfo | None, str]:
    """The model of the zoo, and what names it; None for unnamed weights.

    `expected` is the model that the caller asked for.  Weights that were trained further count as derived from it.
    """
    rows, ours = rows_like(config), our_block(checkpoint)
    saved = next((row for row in rows if row.name == ours.get("name")), None)
    if saved is not None and expected in (None, saved):
        if ours.get("derived") is True:
            saved = replace(saved, derived=True)
        return replace(saved, licence=OWN) if ours.get(
            "from_scratch"
        ) is True else saved, "config.json, as it was saved"
    if expected is not None:
        return expected, "the name that was asked for"
    if ours:
        return None, "config.json, as it was saved"
    repository = row_of_repository(checkpoint.repository)
    for found, where in (
        (repository, "the repository in the path"),
        (next((row for row in rows if row.meta_file == Path(checkpoint.path).stem), None), "the name of the file"),
        (_of_timm(checkpoint, rows), "timm's tag in config.json"),
    ):
        if found is not None and found in rows:
            return found, where
    return None, UNNAMED


def our_block(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The block that `save_pretrained` writes into config.json."""
    ours = checkpoint.config.get("dinov3_infer")
    return ours if isinstance(ours, dict) else {}


def row_of_fingerprint(config: Config, fingerprint: Any) -> ModelInfo | None:
    """The model of this architecture with this fingerprint.

    `fingerprint` is a function; it is called only if a fingerprint is recorded for this architecture.
    """
    rows = [row for row in rows_like(config) if row.fingerprint is not None]
    return next((row for row in rows if row.fingerprint == fingerprint()), None) if rows else None


def _of_timm(checkpoint: Checkpoint, rows: list[ModelInfo]) -> ModelInfo | None:
    """The model of a timm tag.

    None for a model with a classifier, whose weights were most likely trained for the classifier under the old tag.
    """
    config, stated = checkpoint.config, checkpoint.config.get("pretrained_cfg")
    if not isinstance(stated, Mapping) or not isinstance(stated.get("tag"), str):
        return None
    if config.get("num_classes") or stated.get("num_classes"):
        return None
    if any(re.search(r"(^|\.)(head|classifier)\.", name) for name in checkpoint.tensors.shapes):
        return None
    architecture = str(config.get("architecture", stated.get("architecture", "")))

    def fits(row: ModelInfo) -> bool:
        theirs, _, tag = timm_model(row).partition(".")
        plain = theirs.replace("_qkvb", "")
        return tag == stated["tag"] and architecture in ("", plain, plain.replace("_dinov3", "_dinov3_qkvb"))

    return next((row for row in rows if fits(row)), None)
