"""From files on disk to a file of vectors: embed against transformers, timm and dinotool.

    pip install timm torchvision transformers
    OMP_NUM_THREADS=2 python tests/benchmarks/embed_throughput.py

The model is a DINOv3 ViT-S/16 with random weights, saved for each library in its format; images are squashed to 224
pixels, in float32, with the same number of threads for all.  There are two sets, cut from photographs: 3,000 JPEGs of
500 pixels, and 300 of 12 megapixels.  Every measurement is a separate process that loads the model; its time runs from
then until the vectors are in a file.  Each contestant first tries 0, 1, 2 ... workers on a tenth of a set and keeps the
best number.  Then all take turns.  A set that is not measured keeps its record.

"bound" is the smallest possible time: the passes of our model over batches in memory, and the CPU time of decoding and
resizing in one thread, divided by the cores.  The CPU time of each process and its workers is recorded beside the wall
time; on one core both are equal if no other process uses it.  dinotool 0.4 loads only from a hub repository, not from a
folder, so it is listed as not run.  The record goes to records/embed_throughput.json.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(ROOT), str(ROOT / "kernels")]

from made_from import commit  # noqa: E402

SIZE, BATCH = 224, 16
SETS = {"500 px": (500, 375), "12 MP": (4000, 3000)}
COMMON = f"""
import json, os, resource, sys, time
from pathlib import Path
import numpy as np, torch
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
if not torch.cuda.is_available():  # a torchvision built for CUDA beside a CPU build of torch misses these
    schemas = torch.library.Library("torchvision", "FRAGMENT")
    schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
weights, album, out, workers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
paths = sorted(str(path) for path in Path(album).iterdir())[: int(sys.argv[5]) or None]
torch.set_grad_enabled(False)
SIZE, BATCH, TRANSFORMED = {SIZE}, {BATCH}, None
"""
END = """
seconds = time.perf_counter() - begin
loader = None  # its workers have to end to be counted
print(json.dumps(dict(seconds=seconds, cpu=cpu() - used, rows=len(found), width=len(found[0]))))
"""
OURS = """
from dinov3_infer import Backbone
bb = Backbone.from_pretrained(weights + "/hf", device="cpu")
begin, used = time.perf_counter(), cpu()
bb.embed(paths, out, size=SIZE, batch_size=BATCH, num_workers=workers, decode="DECODE")
found = np.load(out)
"""
LOOP = """
rows = []
for batch in loader:
    rows.append(model(batch).numpy())
found = np.concatenate(rows)
np.save(out, found)
"""
SCRIPTS = {
    "ours": OURS.replace("DECODE", "exact"),
    "ours, fast": OURS.replace("DECODE", "fast"),
    "transformers pipeline": """
from transformers import pipeline
found_by = pipeline("image-feature-extraction", weights + "/hf", pool=True, batch_size=BATCH, num_workers=workers)
begin, used = time.perf_counter(), cpu()
found = np.array([row[0] for row in found_by(paths)], np.float32)
np.save(out, found)
""",
    "DataLoader + transformers": """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
processor, net = AutoImageProcessor.from_pretrained(weights + "/hf"), AutoModel.from_pretrained(weights + "/hf").eval()
class Pictures(torch.utils.data.Dataset):
    def __len__(self): return len(paths)
    def __getitem__(self, i):
        return processor(Image.open(paths[i]).convert("RGB"), return_tensors="pt")["pixel_values"][0]
model = lambda batch: net(batch).pooler_output
begin, used = time.perf_counter(), cpu()
loader = torch.utils.data.DataLoader(Pictures(), BATCH, num_workers=workers)
""" + LOOP,
    "timm": """
import timm
from PIL import Image
from timm.data import create_loader
net = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, global_pool="token",
                        dynamic_img_size=True)
from safetensors.torch import load_file
net.load_state_dict(load_file(weights + "/timm/model.safetensors"))
net.eval()
class Pictures(torch.utils.data.Dataset):
    transform = None
    def __len__(self): return len(paths)
    def __getitem__(self, i): return self.transform(Image.open(paths[i]).convert("RGB")), 0
begin, used = time.perf_counter(), cpu()
loader = create_loader(Pictures(), (3, SIZE, SIZE), BATCH, num_workers=workers, use_prefetcher=False, crop_pct=1.0,
                       crop_mode="squash", interpolation="bilinear", persistent_workers=False)
model = lambda batch: net(batch[0])
""" + LOOP,
}  # fmt: skip
BOUND = """
from dinov3_infer import Backbone, load_image
bb = Backbone.from_pretrained(weights + "/hf", device="cpu")
transform = bb.preprocess.with_options(SIZE)
blank = [torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)]
batches = [transform.batch(blank * min(BATCH, len(paths) - first)) for first in range(0, len(paths), BATCH)]
bb.extractor.features(batches[:1])  # sets things up
begin, used = time.perf_counter(), cpu()
for batch in batches:
    bb.extractor.features([batch])
model, model_cpu = time.perf_counter() - begin, cpu() - used
torch.set_num_threads(1)
used = cpu()
for path in paths:
    transform.place(load_image(path))
print(json.dumps(dict(model=model, model_cpu=model_cpu, decoding=cpu() - used)))
"""


def write_set(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Writes crops of photographs, resized to this side in pixels."""
    from fetch import photographs
    from PIL import Image

    rng, images = random.Random(0), list(photographs().values())
    folder.mkdir()
    for i in range(count):
        whole = images[i % len(images)]
        left, top = rng.randrange(whole.width // 3), rng.randrange(whole.height // 3)
        box = (left, top, left + whole.width // 2, top + whole.height // 2)
        whole.resize(size, Image.Resampling.BICUBIC, box).save(folder / f"{i:05d}.jpg", "JPEG", quality=92)
    return folder


def measured(script: str, weights: Path, album: Path, workers: int, first: int = 0) -> dict[str, Any]:
    """The measurement of one process; "refused" with the reason if it fails."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-c", COMMON + script, weights, album, f"{folder}/x.npy", workers, first]
        done = subprocess.run([str(c) for c in call], capture_output=True, text=True, env=environment)
    if done.returncode:
        return dict(refused=(done.stderr.strip().splitlines() or ["?"])[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def contest(weights: Path, album: Path, rounds: int, most_workers: int, tenth: int) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name, script in SCRIPTS.items():
        trials = [measured(script + END, weights, album, n, tenth) for n in range(most_workers + 1)]
        times = {n: trial["seconds"] for n, trial in enumerate(trials) if "seconds" in trial}
        found[name] = dict(workers=min(times, key=times.__getitem__), trials=times, rounds=[]) if times else trials[0]
    names = [name for name in found if "rounds" in found[name]]
    bounds = []
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name]["rounds"].append(measured(SCRIPTS[name] + END, weights, album, found[name]["workers"]))
        bounds.append(measured(BOUND, weights, album, 0))
    cores = len(os.sched_getaffinity(0))

    def ratio(of: list[float], over: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(of, over, strict=True))

    def rounds(name: str, what: str) -> list[float]:
        return [one[what] for one in found[name]["rounds"]]

    record: dict[str, Any] = dict(
        contestants=found | {"dinotool": dict(refused="takes the name of a repository on a hub, not a local folder")},
        bound=bounds,
    )
    for what, model in (("seconds", "model"), ("cpu", "model_cpu")):
        share = cores if what == "seconds" else 1
        lower = [bound[model] + bound["decoding"] / share for bound in bounds]
        record[what] = dict(
            ours_over_bound=ratio(rounds("ours", what), lower),
            theirs_over_ours={name: ratio(rounds(name, what), rounds("ours", what)) for name in names},
            theirs_over_ours_fast={name: ratio(rounds(name, what), rounds("ours, fast", what)) for name in names},
        )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=list(SETS), help="image sets to measure (default: all)"
    )
    parser.add_argument(
        "--counts", type=int, nargs=2, default=(3000, 300), help="images per set, small and large (default: 3000 300)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="largest number of workers (default: one per core)",
    )
    parser.add_argument("--model", default="vits16", help="model (default: vits16)")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "embed_throughput.json", help="record to write")
    args = parser.parse_args()
    import torch

    from dinov3_infer import Backbone
    from dinov3_infer.cli.doctor import cpu_name

    counts = dict(zip(SETS, args.counts, strict=True))
    before = json.loads(args.out.read_text()) if args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        bb = Backbone.from_config(args.model, seed=0)
        bb.preprocess = bb.preprocess.with_options(SIZE)  # written to preprocessor_config.json
        bb.save_pretrained(weights / "hf")
        bb.save_pretrained(weights / "timm", layout="timm")
        cells = before.get("cells", {})
        for name in args.sets:
            album = write_set(Path(folder) / "album", counts[name], SETS[name])
            cells[name] = dict(
                model=args.model, size=SIZE, batch=BATCH, count=counts[name], rounds=args.rounds,
                cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(), machine=cpu_name(),
                torch=torch.__version__, commit=commit(),
            ) | contest(weights, album, args.rounds, args.workers, max(1, counts[name] // 10))  # fmt: skip
            shutil.rmtree(album)
    record = dict(cells=cells)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name in args.sets:
        print(name, json.dumps({what: cells[name][what] for what in ("seconds", "cpu")}, indent=1))


if __name__ == "__main__":
    main()
