"""The first features of a process import torch, but no compiler, no Triton, no hub client and no other library."""

import json
import os
import subprocess
import sys

import torch
from cli_runs import small_model
from repository import ROOT

SCRIPT = """
import sys, time, json
import torch
known, begun = set(sys.modules), time.process_time()
from dinov3_infer import Backbone
Backbone
imported = time.process_time() - begun
Backbone.from_pretrained(sys.argv[1], device="cpu").extract_features(sys.argv[2])
print(json.dumps([imported, sorted(set(sys.modules) - known)]))
"""
EXPENSIVE = {"torch._dynamo", "torch._inductor", "sympy", "triton", "huggingface_hub", "httpx",
             "torchvision", "transformers", "timm", "peft", "tqdm", "numpy.testing"}  # fmt: skip


def test_loading_from_a_directory_imports_little() -> None:
    """CPU time is compared, so that a busy machine does not matter."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, small_model(), ROOT / "examples" / "cat.jpg"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds, new = json.loads(done.stdout)
    by_torch = {"sympy"} if torch.__version__ < "2.9" else set()  # torch._check imports it there
    expensive = EXPENSIVE & set(new) - by_torch
    assert not expensive, expensive
    assert seconds < 0.4, f"{seconds:.2f} s of CPU time to import Backbone, 0.07 s when this was written"
