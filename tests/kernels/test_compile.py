"""Every shipped configuration compiles for its chips, without a GPU; see compile_kernels.py for what is judged."""

import subprocess
import sys

import pytest
from repository import ROOT

pytest.importorskip("triton")


@pytest.mark.slow
def test_all_configurations_compile() -> None:
    """In a process of its own: this one may have Triton as an interpreter."""
    script = ROOT / "tests" / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
