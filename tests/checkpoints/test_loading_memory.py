"""Loading takes little more memory than the parameters, in every layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov3_infer.checkpoints.config_json import hf_config, timm_config
from dinov3_infer.checkpoints.layouts import layout_for
from dinov3_infer.checkpoints.saving import restore
from dinov3_infer.model.vit import VisionTransformer, ViTConfig
from dinov3_infer.zoo import ARCHITECTURES, MODELS, preprocess_of

ROW = MODELS["dinov3_vitl16"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]

# The resident set is sampled, since `import torch` alone has passed through a higher peak than it ends at, which the
# kernel's own high-water mark would keep.  Summing every parameter afterwards makes mapped pages count.
MEASURE = """
import json, sys, threading, time
import torch

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile", "RssShmem"))) * 1024

before, peak, done = resident(), 0, False

def sample():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.01)

thread = threading.Thread(target=sample)
thread.start()
from dinov3_infer import Backbone
model = Backbone.from_pretrained(sys.argv[1], device="cpu")
total = sum(float(p.double().sum()) if p.numel() < 1e6 else float(p.sum()) for p in model.parameters())
peak = max(peak, resident())
done = True
thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"ratio": (peak - before) / size, "bytes": size, "total": total}))
"""

HUGE_FEW_BLOCKS = ViTConfig(1280, 6, 20, 5120, gated=True)


def write(folder: Path, config: ViTConfig, layout: str) -> Path:
    """A checkpoint with random values in the layout's names."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VisionTransformer(config).state_dict().items()}
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    name, _, kind = layout.partition(".")
    tensors, _ = restore(state, config, layout_for(config, name))  # type: ignore[arg-type]
    path = folder / (f"m.{kind}" if kind else "model.safetensors")
    if kind == "pth":
        torch.save(tensors, path)
    else:
        save_file({n: t.clone() for n, t in tensors.items()}, path)
    if kind:
        return path
    settings = hf_config(config) if name == "hf" else timm_config(config, ROW, preprocess_of(ROW), True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("layout", "config", "most"),
    [
        # 5 %: what Python imports beside torch, the norms' and tokens' copies and the allocator's slack
        ("meta.safetensors", ARCHITECTURES["dinov3_vitl16"], 1.05),
        ("meta.pth", ARCHITECTURES["dinov3_vitl16"], 1.05),
        ("timm", ARCHITECTURES["dinov3_vitl16"], 1.05),
        # while a part is copied into the joined tensor, both it and the pages that it is read from are there
        ("hf", ARCHITECTURES["dinov3_vitl16"], 1.3),
        ("hf", HUGE_FEW_BLOCKS, 1.3),
        ("meta.safetensors", HUGE_FEW_BLOCKS, 1.3),
    ],
    ids=["L-meta", "L-meta_pth", "L-timm", "L-hf", "gated-hf", "gated-meta"],
)
def test_peak_memory_of_loading(layout: str, config: ViTConfig, most: float, tmp_path: Path) -> None:
    """Peak resident memory above that after `import torch`, relative to the bytes of the parameters."""
    path = write(tmp_path, config, layout)
    try:
        run = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, timeout=300)
    finally:
        for file in tmp_path.iterdir():  # 1.2 GB each, which pytest would keep for three runs
            file.unlink()
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    print(f"{layout}: peak {found['ratio']:.3f} times the parameters ({found['bytes'] / 2**20:,.0f} MiB)")
    assert found["total"] > 0
    assert found["ratio"] > 0.95, "less than the parameters: the measurement is broken"
    assert found["ratio"] <= most
