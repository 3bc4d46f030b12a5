"""`dinov3-infer train`: the trainer, whose options are the fields of its settings."""

import argparse

from ..train.command import main

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    return main(args.options)
