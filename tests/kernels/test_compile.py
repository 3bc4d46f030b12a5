"""Every shipped configuration compiles for its chips, without a GPU; see compile_kernels.py for what is judged."""

import os
import subprocess
import sys

import pytest
from repository import ROOT

pytest.importorskip("triton", minversion="3.6")


FUSION = """
import kernel_cases as c
case = c.Case("rotate", "sm80", 64, c.BF16, c.ROTATION)
print(c.built(case).asm["ptx"].count("fma.rn.f32"))
"""


def test_multiplications_are_fused_whatever_the_default() -> None:
    """Triton's default changes between versions; here it says no, and the launch options say yes."""
    options = dict(os.environ, TRITON_DEFAULT_FP_FUSION="0", PYTHONPATH=str(ROOT / "tests" / "support"))
    done = subprocess.run([sys.executable, "-c", FUSION], capture_output=True, text=True, timeout=300, env=options)
    assert int(done.stdout.split()[-1]) >= 32, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_all_configurations_compile() -> None:
    """In a process of its own: this one may have Triton as an interpreter."""
    script = ROOT / "tests" / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
