"""`dinov3-infer bench`: the speed of this package against the other libraries that are installed."""

from .report import run

__all__ = ["run"]
