"""The path of the checkout."""

from pathlib import Path

__all__ = ["BENCHMARKS", "EXAMPLES", "ROOT"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "tests" / "benchmarks"
