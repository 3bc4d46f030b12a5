"""`dinov3-infer export`: writes an ONNX or torch.export file and checks it."""

import argparse

from ..backbone import Backbone
from .inputs import check_file
from .main import OK, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Exports a model; returns the exit status."""
    out = check_file(args.out, args.overwrite, (".onnx", ".pt2"))
    bb = Backbone.from_pretrained(args.model, device="cpu", dtype=args.dtype)
    bb.export(out, size=args.size, dynamic=args.dynamic, opset=args.opset)
    mean, std = ([round(value, 4) for value in values] for values in (bb.preprocess.mean, bb.preprocess.std))
    tell(f"wrote '{out}' and checked its tokens; its input is (RGB in 0..1 - {mean}) / {std}")
    return OK
