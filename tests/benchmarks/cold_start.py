"""Cold start: time of a whole process up to the first feature, against transformers and timm.

    pip install timm torchvision
    OMP_NUM_THREADS=1 python tests/benchmarks/cold_start.py

ViT-S/16 and ViT-B/16 of DINOv3 with the same random weights, saved once by each library in its own format to a local
directory.  Every measurement is a separate process that imports its library, loads the directory and computes one class
token at 256 x 256 pixels: from a JPEG file with the preprocessing of the library ("picture"), or from pixels in memory
("pixels", for which the other libraries need no torchvision).  Our time includes building the plan for CPUs; "new
machine" also includes compiling its C code, and is compared with "picture" of the others.  Classes are imported
directly, which is faster than transformers' Auto classes.  The vectors of "pixels" are compared first.

Rounds alternate and rotate.  A ratio is the median over the rounds of our time divided by theirs, so below 1 we are
faster.  CPU time (user and system) is recorded beside wall time, because other processes do not change it.  "torch" is
the import of torch alone.  The record is written to records/cold_start.json.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from made_from import commit  # noqa: E402

ROOT = HERE.parent.parent
CAT = ROOT / "examples" / "cat.jpg"
ROUNDS = 11
MODELS = {"S": "dinov3_vits16", "B": "dinov3_vitb16"}

# A CUDA build of torchvision beside a CPU build of torch cannot load its binary and lacks two operator schemas.
SCHEMAS = """
import torch
if not torch.cuda.is_available():
    schemas = torch.library.Library("torchvision", "FRAGMENT")
    schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
PIXELS = "pixels = torch.linspace(-2, 2, 3 * 256 * 256).view(1, 3, 256, 256)\n"
OURS = """
from dinov3_infer import Backbone
bb = Backbone.from_pretrained(sys.argv[1], device="cpu")
found = bb.extract_features(sys.argv[2], size=256).cls_token
"""
NEW = "import os, tempfile\nempty = tempfile.TemporaryDirectory()\nos.environ['XDG_CACHE_HOME'] = empty.name\n"
SCRIPTS = {
    ("ours", "picture"): OURS,
    ("ours", "new machine"): NEW + OURS,
    ("ours", "pixels"): f"""
import torch
from dinov3_infer import Backbone
bb = Backbone.from_pretrained(sys.argv[1], device="cpu")
{PIXELS}
with torch.inference_mode():
    found = bb(pixels).cls_token
""",
    ("transformers", "picture"): f"""
{SCHEMAS}
from PIL import Image
from transformers import DINOv3ViTImageProcessor, DINOv3ViTModel
model = DINOv3ViTModel.from_pretrained(sys.argv[1])
processor = DINOv3ViTImageProcessor.from_pretrained(sys.argv[1], size=dict(height=256, width=256))
with torch.inference_mode():
    found = model(**processor(Image.open(sys.argv[2]), return_tensors="pt")).pooler_output
""",
    ("transformers", "pixels"): f"""
{SCHEMAS}
from transformers import DINOv3ViTModel
model = DINOv3ViTModel.from_pretrained(sys.argv[1])
{PIXELS}
with torch.inference_mode():
    found = model(pixels).pooler_output
""",
    ("timm", "picture"): f"""
{SCHEMAS}
import timm
from PIL import Image
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True, num_classes=0, global_pool="token").eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    found = model(transform(Image.open(sys.argv[2]).convert("RGB"))[None])
""",
    ("timm", "pixels"): f"""
{SCHEMAS}
import timm
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True, num_classes=0, global_pool="token").eval()
{PIXELS}
with torch.inference_mode():
    found = model(pixels)
""",
}
PEERS = ("transformers", "timm")
CASES = {"picture": "picture", "pixels": "pixels", "new machine": "picture"}  # our case -> the case of the others


def save(folder: Path) -> None:
    """Writes the same weights in three formats, each with its library."""
    code = f"""
import sys
{SCHEMAS}
import timm, transformers
from dinov3_infer import Backbone
name, folder = sys.argv[1:]
bb = Backbone.from_config(name, seed=0)
bb.save_pretrained(folder + "/ours")
bb.save_pretrained(folder + "/as_timm", layout="timm")
transformers.AutoModel.from_pretrained(folder + "/ours").save_pretrained(folder + "/transformers")
transformers.AutoImageProcessor.from_pretrained(folder + "/ours").save_pretrained(folder + "/transformers")
model = timm.create_model("local-dir:" + folder + "/as_timm", pretrained=True, num_classes=0)
timm.models.save_for_hf(model, folder + "/timm", safe_serialization=True)
"""
    for size, name in MODELS.items():
        (folder / size).mkdir()
        subprocess.run(
            [sys.executable, "-c", code, name, folder / size], env=environment(), check=True, capture_output=True
        )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def measure(code: str, *arguments: str) -> tuple[float, float, list[float]]:
    """(wall seconds, CPU seconds, first numbers of the vector) of a process."""
    read, write = os.pipe()
    ending = f"\nimport os, json\nos.write({write}, json.dumps(found[0, :8].tolist()).encode())"
    code = f"import sys\n{code}{ending if 'found' in code else ''}"
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment(), pass_fds=(write,),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(write)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    with os.fdopen(read, "rb") as pipe:
        vector = json.loads(pipe.read() or b"[]")
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read().decode()[-2000:]
    return wall, usage.ru_utime + usage.ru_stime, vector


def compare(folder: Path) -> None:
    """Checks that all three compute the same vector."""
    for size in MODELS:
        vectors = [measure(SCRIPTS[name, "pixels"], str(folder / size / name), "")[2] for name in ("ours", *PEERS)]
        worst = max(abs(a - b) for other in vectors[1:] for a, b in zip(vectors[0], other, strict=True))
        assert len(vectors[0]) == 8 and worst < 1e-4, f"{size}: {vectors}"


def contest(folder: Path) -> list[dict[str, dict[str, float]]]:
    """Times of every contestant in every round, in seconds."""
    contestants = [("torch", "", "", "import torch")]
    contestants += [(name, size, case, code) for size in MODELS for (name, case), code in SCRIPTS.items()]
    rounds = []
    for i in range(ROUNDS + 1):
        found: dict[str, dict[str, float]] = {}
        for j in range(len(contestants)):
            name, size, case, code = contestants[(i * 5 + j) % len(contestants)]
            wall, cpu, _ = measure(code, str(folder / size / name), str(CAT))
            found[f"{name} {size} {case}".strip()] = {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4)}
        if i:  # the first process warms the file cache
            rounds.append(found)
        print(f"round {i} of {ROUNDS}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return rounds


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in MODELS:
        for case, other in CASES.items():
            for peer in PEERS:
                for unit in ("wall_s", "cpu_s"):
                    ours, theirs = f"ours {size} {case}", f"{peer} {size} {other}"
                    ratios = sorted(r[ours][unit] / r[theirs][unit] for r in rounds)
                    found[f"{size} {case}: ours / {peer}, {unit}"] = {
                        "median": round(statistics.median(ratios), 3), "lowest": round(ratios[0], 3),
                        "highest": round(ratios[-1], 3), "ours": statistics.median(r[ours][unit] for r in rounds),
                        peer: statistics.median(r[theirs][unit] for r in rounds),
                    }  # fmt: skip
    return found


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        compare(folder)
        begun = os.getloadavg()[0]
        rounds = contest(folder)
    results = summary(rounds)
    libraries = ("torch", "transformers", "timm", "torchvision", "numpy", "pillow", "safetensors")
    record = {
        "what": "whole process: import, load a local directory, one class token at 256 x 256",
        "commit": commit(),
        "machine": {
            "cpu": cpu(), "cores": os.cpu_count(), "platform": platform.platform(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "load_average": [begun, os.getloadavg()[0]],
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "results": results,
        "rounds": rounds,
    }  # fmt: skip
    target = HERE / "records" / "cold_start.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    for title, result in results.items():
        print(f"{title}: {result['median']:.3f} ({result['lowest']:.3f} to {result['highest']:.3f})")


if __name__ == "__main__":
    main()
