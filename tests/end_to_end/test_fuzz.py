"""Thousands of damaged and hostile inputs of each kind raise plain errors only.  See tests/support/fuzzing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import BENCHMARKS, ROOT

SCRIPT = BENCHMARKS / "fuzz.py"
RECORD = BENCHMARKS / "records" / "fuzz.json"


OPTIONS = {
    "pictures": "images", "checkpoints": "checkpoints", "addresses": "addresses", "tars": "tars", "tables": "tables",
    "probes": "probes",
}  # fmt: skip
LONG = {"pictures": 100_000, "checkpoints": 100_000, "addresses": 3000, "tars": 2500, "tables": 1500, "probes": 500}


def fuzzed(kind: str, count: int, out: Path) -> dict[str, Any]:
    """Runs this many cases of one kind and returns the record."""
    command = [sys.executable, SCRIPT, "--seed", 6, "--out", out]
    for name, option in OPTIONS.items():
        command += [f"--{option}", count if name == kind else 0]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # in a separate process, because its workers are forked
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=550, env=environment)
    assert out.exists(), done.stderr[-2000:]
    return json.loads(out.read_text())[kind]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["pictures", "checkpoints"])
def test_two_thousand(kind: str, tmp_path: Path) -> None:
    """There is no fault, every error branch is met, and at least half of the inputs look valid at first."""
    found = fuzzed(kind, 2000, tmp_path / "record.json")
    assert found["faults"] == [] and found["all ended"], found["faults"][:5]
    assert found["branches not hit"] == []
    assert found["cases"] >= 2000 and found["looks right"] >= 0.5 and found["ends"]["read"] > 50


@pytest.mark.parametrize("kind, count", [("addresses", 1000), ("tars", 1000), ("tables", 500), ("probes", 200)])
def test_hundreds(kind: str, count: int, tmp_path: Path) -> None:
    """Covers what surrounds images and checkpoints: requests, containers and results."""
    if kind == "tables":
        pytest.importorskip("pyarrow")
    found = fuzzed(kind, count, tmp_path / "record.json")
    assert found["faults"] == [] and found["all ended"], found["faults"][:5]
    assert found["cases"] >= count and found["looks right"] >= 0.4 and found["ends"]["read"] > count // 40


def test_the_record_is_of_a_long_run() -> None:
    """The record has many cases of each kind and no fault."""
    if not RECORD.exists():
        pytest.skip("no long run was recorded yet")
    record = json.loads(RECORD.read_text())
    for kind, count in LONG.items():
        found = record[kind]
        assert found["cases"] >= count and found["looks right"] >= 0.4 and found["all ended"]
        assert not found["faults"] and not found["branches not hit"]
        assert found["slowest, CPU s"] <= 5 and found["most memory, MiB"] <= 1024


@pytest.mark.parametrize(
    "fault",
    ["raise KeyError('x')", "os.kill(os.getpid(), 11)", "open('left', 'w')", "bytearray(1500 * 2**20)",
     "exec('while True: pass')", "raise ImageError('two\\nlines at ' + '0x7f' * 999 + hex(id(0)))"],
    ids=["other_class", "crash", "writes", "memory", "hang", "address"],
)  # fmt: skip
def test_faults_are_noticed(fault: str, tmp_path: Path) -> None:
    """The runner reports each kind of fault with its case, and continues."""
    script = f"""
import os, sys, json
sys.path[:0] = {[str(ROOT), str(ROOT / "tests" / "support")]!r}
from fuzzing import runner
from dinov3_infer.errors import ImageError
runner.SECONDS = 0.5
def read(source, draw):
    if source == "bad":
        {fault}
corners = {{"one": lambda folder: "good", "two": lambda folder: "bad"}}
kind = runner.Kind("x", lambda draw, folder: ("good", True), read, corners, (), {{}})
print(json.dumps(runner.run(kind, 5, 0)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert [fault["case"] for fault in found["faults"]] == ["two"], done.stderr
    assert found["cases"] == 7 and found["all ended"] and found["ends"]["read"] == 6
