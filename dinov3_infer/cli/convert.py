"""`dinov3-infer convert`: writes weights in another layout, reads them back and compares."""

import argparse
import math
import os
from collections import Counter

import torch

from ..backbone import Backbone
from ..checkpoints.reading import open_checkpoint
from ..errors import CheckpointError
from ..hub.locate import HubOptions, locate
from .inputs import check_file, check_folder
from .main import OK, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Converts a checkpoint; returns the exit status.

    Raises:
        CheckpointError: the written file has other weights than the source.
        InputError: the output exists or has a wrong name.
    """
    if args.to == "meta":
        out = check_file(args.out, args.overwrite, (".pth", ".safetensors"))
    else:
        out = check_folder(args.out, args.overwrite)
    path, info = locate(args.source, HubOptions())
    dtype = _dtype(path)
    bb = Backbone.from_pretrained(
        args.source if info else path, device="cpu", dtype=dtype, layout=args.layout, num_heads=args.num_heads
    )
    expected = bb.fingerprint()
    bb.save_pretrained(out, args.to)
    heads = bb.config.num_heads if args.to == "meta" else None  # Meta's layout does not state them
    del bb
    found = Backbone.from_pretrained(out, device="cpu", dtype=dtype, layout=args.to, num_heads=heads).fingerprint()
    if found != expected:
        raise CheckpointError(f"the weights written to '{out}' differ from '{args.source}'; please report this")
    tell(f"wrote '{out}' in the layout {args.to}; read back, it has the fingerprint of '{args.source}': {found[:16]}")
    return OK


def _dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """The dtype of most numbers in a checkpoint, which the conversion keeps."""
    tensors = open_checkpoint(path).tensors
    numbers: Counter[torch.dtype] = Counter()
    for name, shape in tensors.shapes.items():
        if (dtype := tensors.dtypes[name]) is not None:
            numbers[dtype] += math.prod(shape)
    return numbers.most_common(1)[0][0] if numbers else torch.float32
