"""`dinov3-infer train`: the trainer, which knows its own options."""

import argparse

from ..train.command import main

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    return main(args.rest)
