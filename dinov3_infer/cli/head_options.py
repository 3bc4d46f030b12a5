"""Options of the commands for released heads.  This module does not import torch."""

import argparse

from .values import count, pixels, size

__all__ = ["DEVICE", "HEADS", "USUAL", "classify", "levels"]

DEVICE = "cpu, cuda, cuda:1 or mps (default: cuda or mps if available, else cpu)"

USUAL = {  # kind of a head -> the default head
    "classifier": "dinov2_vits14_lc",
    "depth": "dinov2_vits14_dd",
    "segments": "dinov2_vits14_ade20k_linear",
    "text": "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l",
}


def classify(found: argparse.ArgumentParser) -> None:
    """Adds the options of `classify`."""
    _head(found, "classifier")
    _labels(found, "the classes of ImageNet")
    found.add_argument(
        "--layers",
        type=int,
        choices=(1, 4),
        help="blocks that the classifier reads, if both variants are released (default: 4)",
    )
    found.add_argument("--top", type=count, default=5, metavar="N", help="labels per image (default: 5)")


def _depth(found: argparse.ArgumentParser) -> None:
    _head(found, "depth")
    levels(found)
    found.add_argument(
        "--dataset",
        choices=("NYU", "KITTI"),
        help="data set of the head: NYU for indoors, KITTI for streets (default: NYU)",
    )
    found.add_argument("--layers", type=int, choices=(1, 4), help="blocks that a linear head reads (default: 4)")
    text = "long side in pixels, HEIGHTxWIDTH, or own (default: at most 768 with DINOv2, else the owner's size)"
    found.add_argument("--size", type=size, help=text)


def _segments(found: argparse.ArgumentParser) -> None:
    _head(found, "segments")
    _labels(found, "the classes of the head")
    levels(found)
    found.add_argument("--size", type=pixels, default=512, help="short side in pixels (default: 512)")


def _head(found: argparse.ArgumentParser, kind: str) -> None:
    found.add_argument("--head", metavar="NAME", help=f"name of a released head (default: {USUAL[kind]})")
    text = "weights of the head, or a folder in the transformers layout; repeat it for two files (default: downloaded)"
    found.add_argument("--weights", action="append", metavar="FILE", help=text)
    found.add_argument("--backbone", metavar="FILE", help="weights of the backbone (default: downloaded)")
    found.add_argument("--device", default="auto", help=DEVICE)


def _labels(found: argparse.ArgumentParser, usual: str) -> None:
    text = f"labels to choose from, or @FILE with one per line; uses a text head (default: {usual})"
    found.add_argument("--labels", metavar="A,B,...", help=text)
    text = "sentence with {} for the label; can be repeated (default: the 80 sentences of CLIP)"
    found.add_argument("--template", action="append", metavar="TEXT", help=text)


def levels(found: argparse.ArgumentParser) -> None:
    """Adds --levels."""
    found.add_argument("--levels", metavar="LOW,HIGH",
                       help="for images of more than 8 bits: the values that become black and white; or 'full' for the "
                       "range of the data type, or 'percentile' for percentiles of each image (default: such images "
                       "are an error)")  # fmt: skip


HEADS = (  # kind, its line in the help, the function that adds its options
    ("depth", "draw the depth of every pixel in metres, with one scale for all images", _depth),
    ("segments", "draw the class of every pixel, with a legend", _segments),
)
