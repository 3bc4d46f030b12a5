"""Options of `show` for released heads, which bring their backbone.  Nothing here imports torch."""

import argparse

from .values import pixels, size

__all__ = ["HEADS"]


def _depth(found: argparse.ArgumentParser) -> None:
    _common(found, "dinov2_vits14_dd")
    found.add_argument("--dataset", choices=("NYU", "KITTI"), help="trained indoors or on streets (NYU)")
    found.add_argument("--layers", type=int, choices=(1, 4), help="blocks that a linear head looks at (4)")
    text = "pixels of the long side, HEIGHTxWIDTH, or own (768 at most for DINOv2's, what the owner takes for others)"
    found.add_argument("--size", type=size, help=text)


def _segments(found: argparse.ArgumentParser) -> None:
    _common(found, "dinov2_vits14_ade20k_linear")
    found.add_argument("--size", type=pixels, default=512, help="pixels of the short side (512)")


def _common(found: argparse.ArgumentParser, head: str) -> None:
    found.add_argument("--head", default=head, metavar="NAME", help=f"released head, with its backbone ({head})")
    found.add_argument("--weights", metavar="FILE", help="of the head, or a folder of transformers (downloaded)")
    found.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (auto: cuda if there is one)")
    text = "of images of more than 8 bits what is black and white; or full (of their type), or percentile (their own)"
    found.add_argument("--levels", metavar="LOW,HIGH", help=text)


HEADS = (  # kind, its line in the help, and what adds its options
    ("depth", "depth in metres of every pixel, in colours with one scale for all images", _depth),
    ("segments", "the class of every pixel, in colours with a legend", _segments),
)
