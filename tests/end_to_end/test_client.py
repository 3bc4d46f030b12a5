"""A typed client of every public call runs, and passes mypy --strict and pyright."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from repository import ROOT

CLIENT = ROOT / "tests" / "support" / "client.py"
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def done(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": PATHS, "MYPYPATH": PATHS}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_it_runs() -> None:
    ran = done(sys.executable, str(CLIENT))
    assert ran.returncode == 0, ran.stderr[-1000:]


@pytest.mark.slow
def test_mypy_passes() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    ran = done(sys.executable, "-m", "mypy", "--strict", str(CLIENT))
    assert ran.returncode == 0, ran.stdout[-2000:]


@pytest.mark.peers
def test_pyright_passes() -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    ran = done(pyright, "--pythonpath", sys.executable, str(CLIENT))
    assert ran.returncode == 0, ran.stdout[-2000:]
