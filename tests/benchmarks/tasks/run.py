"""Measures the tasks of the package and the examples, and writes the table of examples/README.md.

    pip install onnx; python tests/benchmarks/tasks/run.py [TASK ...]    # what the record has already is not run again
    python tests/benchmarks/tasks/run.py --table                         # the table alone

Each task is run with 3 seeds on real DINOv2 ViT-S/14 weights (fine-tuned for saliency; see fetch.py), on the same
architecture with random weights, and on plain pixels.  A task is passed where the real weights beat each of the others,
seed by seed, by 0.10 and by 3 standard errors of that difference, and reach the floor where the task has one.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import dinov3_infer

HERE = Path(__file__).parent
RECORD, README = HERE.parent / "records" / "tasks.json", HERE.parents[2] / "examples" / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
SEEDS, MARGIN, ERRORS = range(3), 0.10, 3.0


class Task(NamedTuple):
    function: str  # in tasks.py
    by: str  # what is measured
    pictures: str
    measure: str
    floor: float = 0.0
    head: str = ""  # argument of the function


# fmt: off
TASKS = {
    "k-NN": Task("knn", "`KNN`", "CIFAR-10, 600 + 300", "accuracy"),
    "linear probe": Task("linear", "`LinearProbe`", "CIFAR-10, 600 + 300", "accuracy"),
    "attentive probe": Task("attentive", "`AttentiveProbe`", "CIFAR-10, 600 + 300", "accuracy"),
    "one-shot segmentation": Task("one_shot", "`OneShotSegmenter`", "stamps, 16 pairs", "IoU"),
    "retrieval": Task("retrieved", "`retrieval.py`", "stamps, 40 things", "recall at 5"),
    "foreground": Task("split", "`foreground.py`", "stamps, 32", "IoU"),
    "object discovery": Task("discovered", "`discovery.py`", "stamps, 32", "CorLoc"),
    "keypoint transfer": Task("transferred", "`matching.py`", "graf, Aloe, Motorcycle, 600 points", "PCK at 3 %"),
    "sparse matching": Task("matched", "`matching.py`", "leuven, 100 matches", "epipolar inliers"),
    "tracking": Task("tracked", "`tracking.py`", "moving stamps, 5 clips", "J&F"),
    "anomaly maps": Task("odd", "`anomaly.py`", "grey stamps on 3 textures", "AP of pixels"),
    "video": Task("happening", "`video.py`", "moving stamps, 120 + 60 clips", "accuracy"),
    "depth, linear": Task("depth_of", "`depth.py`", "Aloe, Motorcycle, 12 + 12 tiles", "delta1", head="linear"),
    "depth, DPT": Task("depth_of", "`depth.py`", "Aloe, Motorcycle, 12 + 12 tiles", "delta1", head="dpt"),
    "normals": Task("facing", "`normals.py`", "Aloe, Motorcycle, 24 tiles", "within 30 degrees"),
    "linear segmentation": Task("segmented", "`SegmentationHead`", "stamps, 240 + 48", "mIoU"),
    "detection": Task("detected", "`detection.py`", "stamps, 240 + 48", "AP50", floor=0.3),
    "instances": Task("cut_out", "`masks.py`", "stamps, 240 + 48", "mask AP50"),
    "panoptic": Task("panoptic", "`masks.py`", "stamps, 240 + 48", "PQ"),
}
# fmt: on


def measure(names: list[str]) -> None:
    import tasks
    from models import MODELS

    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for _, group in itertools.groupby(names, key=lambda name: TASKS[name].pictures):  # what shares its features
        for seed, model, name in itertools.product(SEEDS, MODELS, list(group)):
            task, runs = TASKS[name], record.setdefault(name, {}).setdefault(model, {})
            if str(seed) in runs:
                continue
            function = getattr(tasks, task.function)
            began, cpu = time.perf_counter(), time.process_time()
            value = (function(task.head) if task.head else function)(model, seed)
            runs[str(seed)] = {
                "value": round(value, 4), "seconds": round(time.perf_counter() - began, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1), "threads": torch.get_num_threads(),
                "versions": {"dinov3_infer": dinov3_infer.__version__, "torch": torch.__version__},
                "machine": platform.machine(),
            }  # fmt: skip
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            print(f"{name}, {model}, seed {seed}: {value:.3f}", flush=True)


def verdict(task: Task, values: dict[str, list[float]]) -> str:
    """ "passed", or what is missing."""
    lacks = []
    for other in ("random", "pixels"):
        ahead = [a - b for a, b in zip(values["real"], values[other], strict=True)]
        gap, error = statistics.mean(ahead), statistics.stdev(ahead) / math.sqrt(len(ahead))
        if gap < max(MARGIN, ERRORS * error):
            lacks.append(f"{gap:+.3f} ± {error:.3f} over {other}")
    if statistics.mean(values["real"]) < task.floor:
        lacks.append(f"below {task.floor}")
    return "; ".join(lacks) or "passed"


def table(record: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """The Markdown table: means over the seeds with standard errors."""
    rows = [
        "| task | by | images | measure | real weights | random weights | plain pixels | outcome |",
        "|" + " --- |" * 8,
    ]
    for name, task in TASKS.items():
        found = {m: [run["value"] for run in runs.values()] for m, runs in record.get(name, {}).items()}
        if len(found) < 3 or any(len(v) < len(SEEDS) for v in found.values()):
            rows.append(f"| {name} | {task.by} | {task.pictures} | {task.measure} | not measured | | | |")
            continue
        cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v) / math.sqrt(len(v)):.3f}" for v in found.values()]
        shown = dict(zip(found, cells, strict=True))
        numbers = " | ".join(shown[model] for model in ("real", "random", "pixels"))
        rows.append(f"| {name} | {task.by} | {task.pictures} | {task.measure} | {numbers} | {verdict(task, found)} |")
    return "\n".join(rows)


def write_table() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    made = table(json.loads(RECORD.read_text()) if RECORD.exists() else {})
    README.write_text(before + BEGIN + "\n" + made + "\n" + END + rest.split(END)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"tasks to measure: {', '.join(TASKS)} (default: all)")
    parser.add_argument("--table", action="store_true", help="only write the table, from the record")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        sys.exit(f"no task is named {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    if not args.table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        measure(args.tasks or list(TASKS))
    write_table()


if __name__ == "__main__":
    main()
