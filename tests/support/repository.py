"""The path of the checkout, and the scripts of its benchmarks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["BENCHMARKS", "EXAMPLES", "ROOT", "benchmarks_importable"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "tests" / "benchmarks"


@contextmanager
def benchmarks_importable() -> Iterator[None]:
    """Scripts of tests/benchmarks import each other by their bare names."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield
    finally:
        sys.path[:] = before
