"""`dinov3-infer train`: hands its arguments to the trainer, which parses them."""

import argparse

from ..train.command import main

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Runs the trainer; returns the exit status."""
    return main(args.rest)
