"""The command line, `dinov3-infer`.

Results go to stdout, messages to stderr.  `parser` holds all options and does not import torch, so that help is
immediate.  Each command is a module with a function `run(args)` that returns the exit status.
"""

from .main import main

__all__ = ["main"]
