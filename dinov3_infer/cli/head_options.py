"""Options of commands for released heads, which bring their backbone.  Nothing here imports torch."""

import argparse

from .values import count, pixels, size

__all__ = ["HEADS", "USUAL", "classify"]

USUAL = {  # kind of a head -> the one that is taken where none is named
    "classifier": "dinov2_vits14_lc",
    "depth": "dinov2_vits14_dd",
    "segments": "dinov2_vits14_ade20k_linear",
    "text": "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l",
}


def classify(found: argparse.ArgumentParser) -> None:
    _head(found, "classifier")
    _labels(found, "ImageNet's")
    found.add_argument("--layers", type=int, choices=(1, 4), help="how many it looks at, where both are released (4)")
    found.add_argument("--top", type=count, default=5, metavar="N", help="labels for each image (5)")


def _depth(found: argparse.ArgumentParser) -> None:
    _head(found, "depth")
    _levels(found)
    found.add_argument("--dataset", choices=("NYU", "KITTI"), help="trained indoors or on streets (NYU)")
    found.add_argument("--layers", type=int, choices=(1, 4), help="blocks that a linear head looks at (4)")
    text = "pixels of the long side, HEIGHTxWIDTH, or own (768 at most for DINOv2's, what the owner takes for others)"
    found.add_argument("--size", type=size, help=text)


def _segments(found: argparse.ArgumentParser) -> None:
    _head(found, "segments")
    _labels(found, "those of the head")
    _levels(found)
    found.add_argument("--size", type=pixels, default=512, help="pixels of the short side (512)")


def _head(found: argparse.ArgumentParser, kind: str) -> None:
    found.add_argument("--head", metavar="NAME", help=f"released head, with its backbone ({USUAL[kind]})")
    text = "of the head, or a folder of transformers; repeat it for a head in two files (downloaded)"
    found.add_argument("--weights", action="append", metavar="FILE", help=text)
    found.add_argument("--backbone", metavar="FILE", help="weights of its backbone (downloaded)")
    found.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (auto: cuda if there is one)")


def _labels(found: argparse.ArgumentParser, usual: str) -> None:
    text = (
        f"choose between these, or the lines of @FILE, with a head of text: dino.txt on DINOv2 L, or --head ({usual})"
    )
    found.add_argument("--labels", metavar="A,B,...", help=text)
    text = "sentence with {} where a label goes; may be repeated (80 of CLIP)"
    found.add_argument("--template", action="append", metavar="TEXT", help=text)


def _levels(found: argparse.ArgumentParser) -> None:
    text = "of images of more than 8 bits what is black and white; or full (of their type), or percentile (their own)"
    found.add_argument("--levels", metavar="LOW,HIGH", help=text)


HEADS = (  # kind, its line in the help, and what adds its options
    ("depth", "depth in metres of every pixel, in colours with one scale for all images", _depth),
    ("segments", "the class of every pixel, in colours with a legend", _segments),
)
