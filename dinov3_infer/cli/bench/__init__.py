"""`dinov3-infer bench`: this package against everything else that is installed."""

from .report import run

__all__ = ["run"]
