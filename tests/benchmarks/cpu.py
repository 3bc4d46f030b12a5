"""From pixels to features on a CPU: our modes against the other installed libraries.

    pip install transformers timm onnx onnxruntime openvino nncf
    python tests/benchmarks/cpu.py [--models S B] [--sizes 224 512] [--batches 1 8] [--rounds 9] [--compile]
                                   [--reference DIR] [--name NAME]
    python tests/benchmarks/figures.py           # write the record into the guide on CPUs

Contestants and method are those of `dinov3-infer bench`.  Of the modes of a library, those that are fastest in a first
call, or nearly so, take part.  Their tokens are checked, then they are timed in interleaved rounds in one process on
the same pixels; a ratio is the median of the ratios of the rounds.  The weights are random, in the shapes of DINOv3's
ViT-S/16 and ViT-B/16.  A cell whose ratio misses its goal also records our time per operator.  The record is written to
records/NAME.json; cells that it holds from the same commit, machine, versions and number of rounds are kept, so that
the table can be measured in parts.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dinov3_infer import Backbone
from dinov3_infer.cli.bench.contest import Cell, Settings, contest, ratios, reason, spread
from dinov3_infer.cli.bench.contestants import MODES as OURS, cell_of, contestants
from dinov3_infer.cli.bench.setup import Contestant, Setup
from dinov3_infer.cli.doctor import cpu_name

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from made_from import commit  # noqa: E402

MODELS = {"S": "dinov3_vits16", "B": "dinov3_vitb16"}
# (precision, start of a contestant's label): goal for the time of the best of these divided by ours
GOALS = {
    ("float32", "transformers"): 2.0,
    ("float32", "timm"): 2.0,
    ("float32", "reference"): 2.0,
    ("float32", "onnxruntime"): 1.0,
    ("float32", "openvino"): 1.0,
    ("bfloat16", "transformers"): 1.5,
    ("bfloat16", "openvino"): 1.0,
    ("int8", "openvino"): 1.0,
}
NEARLY = 1.25  # largest time of a contestant in the rounds, as a multiple of the fastest first call
LIBRARIES = ("torch", "transformers", "timm", "onnxruntime", "openvino", "nncf", "numpy")


def results(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ours against the fastest contestant of each library and precision of a cell."""
    times = {label: entry["rounds_ms"] for label, entry in record["contestants"].items() if "rounds_ms" in entry}
    found: dict[str, dict[str, Any]] = {}
    for (kind, library), goal in GOALS.items():
        ours = times.get(f"ours, extract_features {OURS[kind]}, {kind}")
        theirs = {label: ms for label, ms in times.items() if label.startswith(library) and label.endswith(kind)}
        if ours is None or not theirs:
            continue
        best = min(theirs, key=lambda label: statistics.median(theirs[label]))
        each = ratios(theirs[best], ours)
        found[f"{kind}, {library}"] = {
            "goal": goal, "ratio": round(statistics.median(each), 3), "spread": round(spread(each), 3),
            "ours_ms": round(statistics.median(ours), 2), "theirs": best,
            "theirs_ms": round(statistics.median(theirs[best]), 2),
        }  # fmt: skip
    return found


def operators(setup: Setup, mode: str, count: int = 14) -> list[dict[str, Any]]:
    """Our time by operator and shapes."""
    model = Backbone.from_pretrained(setup.written("hf"), device="cpu", mode=mode)  # type: ignore[arg-type]
    pixels = torch.rand(setup.batch, 3, *setup.size)
    run = lambda: model.extract_features(pixels, size=setup.size, fit="squash")  # noqa: E731
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    events = sorted(profiler.key_averages(group_by_input_shape=True), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operator": event.key, "shapes": str([s for s in event.input_shapes if s])[:120], "calls": event.count,
            "ms": round(event.self_cpu_time_total / 1e3, 3), "share": round(event.self_cpu_time_total / total, 3),
        }
        for event in events[:count]
    ]  # fmt: skip


def trial(cell: Cell, taking_part: list[Contestant], settings: Settings) -> tuple[list[str], dict[str, float | str]]:
    """The contestants that take part; and for each the milliseconds of its second call, or why it failed."""
    took: dict[str, float] = {}
    refused: dict[str, str] = {}
    for label, call in cell.contestants.items():
        settings.tell(label)
        try:
            call(cell.inputs[0])
            begun = time.perf_counter()
            call(cell.inputs[0])
            took[label] = 1e3 * (time.perf_counter() - begun)
        except Exception as error:  # a contestant that cannot run is a result
            refused[label] = reason(error)
    running = [one for one in taking_part if one.label in took]
    best: dict[tuple[str, str], float] = {}
    for one in running:
        kind = (one.library, one.precision)
        best[kind] = min(took[one.label], best.get(kind, math.inf))
    goes_on = [one.label for one in running if took[one.label] <= NEARLY * best[one.library, one.precision]]
    return goes_on, {label: round(ms, 2) for label, ms in took.items()} | refused


def cell(setup: Setup, settings: Settings, what: dict[str, Any]) -> dict[str, Any]:
    torch.compiler.reset()  # frees what was compiled for other cells
    taking_part = contestants(setup)
    whole = cell_of(setup, taking_part)
    goes_on, took = trial(whole, taking_part, settings)
    record = contest(replace(whole, contestants={label: whole.contestants[label] for label in goes_on}), settings)
    record |= {"cell": what, "trial_ms": took}
    record["load_average"] = os.getloadavg()[0]
    record["results"] = results(record)
    short = {name.split(",")[0] for name, found in record["results"].items() if found["ratio"] < found["goal"]}
    record["operators"] = {OURS[kind]: operators(setup, OURS[kind]) for kind in sorted(short)}
    return record


def recorded(name: str = "cpu") -> dict[str, Any]:
    target = HERE / "records" / f"{name}.json"
    return json.loads(target.read_text()) if target.is_file() else {"cells": []}  # type: ignore[no-any-return]


def table(record: dict[str, Any]) -> str:
    """Markdown, with a row per cell and a column per rival."""
    if not record["cells"]:
        return "Not measured yet.\n"
    rivals = [key for key in (f"{kind}, {library}" for kind, library in GOALS)
              if any(key in cell["results"] for cell in record["cells"])]  # fmt: skip
    heads = ["ViT", "pixels", "batch", *(" ".join(reversed(key.split(", "))) for key in rivals)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    rows = []
    for cell in record["cells"]:
        what, found = cell["cell"], cell["results"]
        shown = [f"{found[key]['ratio']:.2f} ± {found[key]['spread']:.2f}" if key in found else "" for key in rivals]
        letter = next(letter for letter, name in MODELS.items() if name == what["model"])
        rows.append((list(MODELS).index(letter), what["pixels"], what["batch"], letter, shown))
    for _, pixels, batch, letter, shown in sorted(rows):
        lines.append("| " + " | ".join([letter, str(pixels), str(batch), *shown]) + " |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(), "platform": platform.platform(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to measure (default: all)"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512], help="sides in pixels (default: 224 512)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images per batch (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads per library (default: torch's)"
    )
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile; takes minutes per cell")
    parser.add_argument("--reference", type=Path, help="also measure Meta's code in this checkout")
    parser.add_argument("--name", default="cpu", help="name of the record (default: cpu)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(torch.device("cpu"), rounds=args.rounds, tell=lambda what: print("  ", what, file=sys.stderr))
    record: dict[str, Any] = {"commit": commit(), "machine": machine(), "versions": versions(), "rounds": args.rounds}
    target = HERE / "records" / f"{args.name}.json"
    before = recorded(args.name)
    record["cells"] = before["cells"] if record == {name: before.get(name) for name in record} else []
    for letter in args.models:
        model = Backbone.from_config(MODELS[letter], seed=0)
        with torch.no_grad():
            for block in model.blocks:  # the initial LayerScale of training would hide the blocks
                block.ls1.gamma.fill_(0.3), block.ls2.gamma.fill_(0.3)
        for size in args.sizes:
            for batch in args.batches:
                with tempfile.TemporaryDirectory() as folder:
                    setup = Setup(
                        model, (size, size), batch, Path(folder), args.threads, compile=args.compile,
                        reference=args.reference,
                    )  # fmt: skip
                    what = {"model": MODELS[letter], "pixels": size, "batch": batch}
                    found = cell(setup, settings, what)
                record["cells"] = [other for other in record["cells"] if other["cell"] != what] + [found]
                target.parent.mkdir(exist_ok=True)
                target.write_text(json.dumps(record, indent=1) + "\n")  # after each cell, since all take long
                for name, result in found["results"].items():
                    print(f"{letter} {size} x{batch}, {name}: {result['ratio']} (goal {result['goal']})")


if __name__ == "__main__":
    main()
