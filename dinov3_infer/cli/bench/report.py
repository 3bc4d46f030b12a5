"""`dinov3-infer bench`: measures this package against the other installed libraries and prints a table."""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ...backbone import Backbone
from ...errors import GatedModelError, ModelNotFoundError, OfflineError
from ...system import whole
from ...zoo import find
from ..doctor import cpu_name, version_of
from ..inputs import check_file
from ..main import FAILED, OK, say, tell
from .contest import Settings, contest, ratios, spread
from .contestants import cell_of, contestants
from .setup import Precision, Setup

__all__ = ["run"]

LEAST_MS = 100.0  # shortest measurement; faster runs are repeated
_LIBRARIES = ("dinov3-infer", "torch", "transformers", "timm", "onnxruntime", "openvino", "nncf")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit status, 1 if no contestant of this package could be timed."""
    out = None if args.json is None else check_file(args.json, args.overwrite, (".json",))
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        model, weights = _model(args)
        size = (args.size, args.size) if isinstance(args.size, int) else args.size
        model.grid_of(torch.empty(1, 3, *size, device="meta"))  # raises for a wrong size
        with tempfile.TemporaryDirectory(prefix="dinov3_infer_bench_") as folder:
            setup = Setup(
                model, size, args.batch, Path(folder), torch.get_num_threads(),
                get_args(Precision) if args.dtype == "all" else (args.dtype,), args.compile,
                None if args.reference is None else Path(args.reference),
            )  # fmt: skip
            found = _measured(setup, args.rounds)
    finally:
        torch.set_num_threads(threads)
    record = dict(model=args.model, weights=weights, threads=setup.threads, environment=_environment(setup)) | found
    for line in _lines(record):
        say(line)
    if not args.compile:
        tell("torch.compile was not measured; add --compile, which takes minutes")
    if out is not None:
        with whole(out) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    ours = [entry for entry in record["contestants"].values() if entry["library"] == "ours"]
    return OK if any("rounds_ms" in entry for entry in ours) else FAILED


def _model(args: argparse.Namespace) -> tuple[Backbone, str]:
    """The model in float32, and its weights: "as given", "as published" if they are cached, else "random"."""
    options: dict[str, Any] = dict(device=args.device, dtype="float32")
    if os.path.exists(args.model):
        return Backbone.from_pretrained(args.model, **options), "as given"
    name = find(args.model).name
    try:
        return Backbone.from_pretrained(name, local_files_only=True, **options), "as published"
    except (OfflineError, GatedModelError, ModelNotFoundError):
        model = Backbone.from_config(name, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.init_weights(layerscale=1.0)  # so that every block changes the tokens
    where = options["device"]
    return model.to(("cuda" if torch.cuda.is_available() else "cpu") if where == "auto" else where), "random"


def _measured(setup: Setup, rounds: int) -> dict[str, Any]:
    """The record of the contest, with library, setting and precision of each contestant."""
    taking_part = contestants(setup)
    with tqdm(bar_format="{desc}", disable=None) as bar:
        settings = Settings(setup.device, rounds, LEAST_MS, bar.set_description_str)
        found = contest(cell_of(setup, taking_part), settings)
    for one in taking_part:
        found["contestants"][one.label] |= dict(library=one.library, setting=one.setting, precision=one.precision)
    return found


def _environment(setup: Setup) -> dict[str, Any]:
    found: dict[str, Any] = dict(platform=platform.platform(), python=platform.python_version())
    cuda = setup.device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(setup.device) if cuda else cpu_name()
    return found | {name: version_of(name) for name in _LIBRARIES}


# --- the table -----------------------------------------------------------------------------------------------------


def _lines(record: dict[str, Any]) -> list[str]:
    """A table for each precision, fastest first, with the ratio of each library's best time to ours."""
    where, cell = record["environment"], record["cell"]
    size = "x".join(str(side) for side in cell["pixels"])
    said = " (speed does not depend on them)" if record["weights"] == "random" else ""
    found = [
        f"{record['model']}, weights {record['weights']}{said}, {size} pixels, batch {cell['batch']}",
        f"{where['device']}, {record['threads']} threads, torch {where['torch']}",
    ]
    entries: dict[str, dict[str, Any]] = record["contestants"]
    for precision in dict.fromkeys(entry["precision"] for entry in entries.values()):
        timed = {k: e for k, e in entries.items() if e["precision"] == precision and "rounds_ms" in e}
        if not timed:
            continue
        order = sorted(timed, key=lambda label: median(timed[label]["rounds_ms"]))
        ours = next((timed[label]["rounds_ms"] for label in order if timed[label]["library"] == "ours"), None)
        found += ["", f"{precision:<42} {'images/s':>10} {'ms':>16} {'time / ours':>14} {'worst cosine':>13}"]
        best: dict[str, str] = {}
        for label in order:
            times, entry = timed[label]["rounds_ms"], timed[label]
            relative = ratios(times, ours) if ours else []
            shown = f"{median(relative):.2f} ±{spread(relative):.2f}" if relative else ""
            best.setdefault(entry["library"], shown)
            found.append(
                f"  {label.removesuffix(f', {precision}'):<40}{1e3 * cell['batch'] / median(times):>11.2f}"
                f" {f'{median(times):.2f} ±{spread(times):.2f}':>16} {shown:>14} {1 - entry['error']:>13.6f}"
            )
        found += [
            f"  {name} at its best takes {x} times as long as ours" for name, x in best.items() if x and name != "ours"
        ]
    reasons: dict[str, list[str]] = {}
    for label, entry in entries.items():
        if "refused" in entry:
            reasons.setdefault(entry["refused"], []).append(label)
    refused = [f"  {'; '.join(labels)}: {why}" for why, labels in reasons.items()]
    return found + (["", "not timed", *refused] if refused else [])
