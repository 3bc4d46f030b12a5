"""The command line, `dinov3-infer`.

Data go to stdout, everything else to stderr.  `parser` knows every option and imports no torch, so that help comes at
once; each command is a module with a function `run(args)` that returns the exit status.
"""

from .main import main

__all__ = ["main"]
