"""`dinov3-infer models`: lists the models that have a name."""

import argparse
import json
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..backbone import Backbone
from ..errors import Dinov3Error, InputError
from ..hub.locate import HubOptions, locate
from ..zoo import MODELS, ModelInfo
from .main import OK, say

__all__ = ["cached", "run"]


def run(args: argparse.Namespace) -> int:
    """Prints a table or a JSON list; returns the exit status.  Raises: InputError if no name matches."""
    pattern = args.pattern if any(c in args.pattern for c in "*?[") else f"*{args.pattern}*"
    rows = [_row(info) for name, info in MODELS.items() if fnmatchcase(name, pattern.lower())]
    if not rows:
        raise InputError(f"no model has {args.pattern!r} in its name; 'dinov3-infer models' lists all {len(MODELS)}")
    if args.json:
        for line in json.dumps(rows, indent=1).splitlines():
            say(line)
        return OK
    lines = [("name", "width", "blocks", "patch", "parameters", "licence", "cached", "weights")]
    for row in rows:
        lines.append(
            (row["name"], str(row["width"]), str(row["blocks"]), str(row["patch_size"]),
             f"{row['parameters'] / 1e6:,.1f} M", row["licence"], "yes" if row["cached"] else "no",
             row["weights"] or ("in this package" if row["cached"] else "none yet"))
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = {"width", "blocks", "patch", "parameters"}
    for texts in lines:
        cells = zip(lines[0], texts, widths, strict=True)
        say("  ".join(cell.rjust(w) if title in right else cell.ljust(w) for title, cell, w in cells).rstrip())
    return OK


def _row(info: ModelInfo) -> dict[str, Any]:
    with torch.device("meta"):
        model = Backbone(info.config)
    return {
        "name": info.name, "family": info.family, "width": model.embed_dim, "blocks": model.n_blocks,
        "heads": getattr(model, "num_heads", None), "patch_size": model.patch_size,
        "registers": model.num_register_tokens, "parameters": sum(p.numel() for p in model.parameters()),
        "licence": info.licence, "gated": info.gated, "cached": cached(info.name),
        "weights": info.hub_id or info.timm_id, "copy": info.timm_id if info.hub_id else None,
    }  # fmt: skip


def cached(name: str) -> str | None:
    """The path of the weights that `from_pretrained` would load without asking the hub; None if there are none."""
    try:
        return str(locate(name, HubOptions(local_files_only=True))[0])
    except Dinov3Error:
        return None
