"""Compares the speed of two checkouts of this repository.

    OMP_NUM_THREADS=2 python tests/benchmarks/two_checkouts.py BEFORE AFTER [--what PART ...] [--rounds 9]

Each measurement is a process, and the rounds are interleaved.  A ratio is the median over the rounds of the time of
AFTER divided by the time of BEFORE, with its quartiles.

"start": `import` is `from dinov3_infer import Backbone` after torch and numpy, in CPU time with the garbage collector
off; `first` is the wall time from the start of the process to the features of one photograph by `nano`.
"embed": wall and CPU time of `embed` over both sets of embed_throughput.py, from the loaded model to the file.
"forward-s", "forward-b": wall time of `extract_features` on pixels in each mode for CPUs, the median of several calls,
for ViT-S or ViT-B at 224 and 512 pixels, in batches of 1 and 8.

A part that is not measured keeps its record in records/two_checkouts.json.
"""

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from made_from import commit  # noqa: E402

IMPORT = """
import gc, json, time, numpy, torch
gc.disable()
begun = time.process_time()
from dinov3_infer import Backbone
print(json.dumps({"import": time.process_time() - begun}))
"""
FIRST = """
import json, os, sys, time
from dinov3_infer import Backbone
Backbone.from_pretrained("nano", device="cpu").extract_features("examples/cat.jpg")
print(json.dumps({"first": time.time() - float(sys.argv[1])}))
"""
FORWARD = """
import json, os, statistics, sys, time, torch
from dinov3_infer import Backbone
found = {}
for mode in ("exact", "fast", "int8"):
    bb = Backbone.from_pretrained(sys.argv[1], device="cpu", mode=mode)
    for size in (224, 512):
        for batch in (1, 8):
            pixels = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            times = []
            for _ in range(2 + max(5, 16 * 224**2 // (batch * size**2))):
                begun = time.perf_counter()
                bb.extract_features(pixels, size=size, fit="squash")
                times.append(time.perf_counter() - begun)
            found[f"{mode}, {size} px, batch {batch}"] = statistics.median(times[2:])
print(json.dumps(found))
"""


def run(checkout: Path, script: str, *arguments: object) -> dict[str, float]:
    """The seconds that one process prints."""
    paths = os.pathsep.join((str(checkout), str(checkout / "kernels")))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(call, cwd=checkout, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def rounds(checkouts: dict[str, Path], measure: Callable[[Path], dict[str, float]], count: int) -> dict[str, object]:
    """Interleaved rounds in alternating order; the first round is not counted."""
    found: list[dict[str, dict[str, float]]] = []
    for turn in range(count + 1):
        order = list(checkouts)[:: -1 if turn % 2 else 1]
        found.append({name: measure(checkouts[name]) for name in order})
    found = found[1:]
    summary = {}
    for what in found[0]["after"]:
        each = sorted(one["after"][what] / one["before"][what] for one in found)
        quartiles = [round(q, 3) for q in quantiles(each, n=4)[::2]]
        summary[what] = dict(ratio=round(median(each), 3), quartiles=quartiles)
    print(json.dumps(summary, indent=1), flush=True)
    return dict(after_by_before=summary, rounds_s=found)


def start(checkouts: dict[str, Path], count: int, folder: Path) -> dict[str, object]:
    import time

    return rounds(checkouts, lambda path: run(path, IMPORT) | run(path, FIRST, time.time()), count)


def embed(checkouts: dict[str, Path], count: int, folder: Path) -> dict[str, object]:
    from embed_throughput import COMMON, END, SCRIPTS, SETS, SIZE, write_set

    from dinov3_infer import Backbone

    bb = Backbone.from_config("vits16", seed=0)
    bb.preprocess = bb.preprocess.with_options(SIZE)
    bb.save_pretrained(folder / "weights" / "hf")
    found = {}
    for (name, size), images in zip(SETS.items(), (3000, 300), strict=True):
        album = write_set(folder / name.replace(" ", ""), images, size)

        def measure(path: Path, album: Path = album) -> dict[str, float]:
            with tempfile.TemporaryDirectory() as out:
                script = COMMON + SCRIPTS["ours"] + END
                times = run(path, script, folder / "weights", album, f"{out}/x.npy", 0, 0)
            return {what: times[what] for what in ("seconds", "cpu")}

        found[name] = rounds(checkouts, measure, count)
    return found


def forward(checkouts: dict[str, Path], count: int, folder: Path, model: str) -> dict[str, object]:
    from dinov3_infer import Backbone

    Backbone.from_config(model, seed=0).save_pretrained(folder / model)
    return rounds(checkouts, lambda path: run(path, FORWARD, folder / model), count)


PARTS = {
    "start": start,
    "embed": embed,
    "forward-s": partial(forward, model="vits16"),
    "forward-b": partial(forward, model="vitb16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the old version")
    parser.add_argument("after", type=Path, help="checkout of the new version")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=["start"], help="parts (default: start)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: 9)")
    args = parser.parse_args()
    checkouts = {"before": args.before.resolve(), "after": args.after.resolve()}
    for path in checkouts.values():  # as pip does; without it an import compiles its source
        for folder in ("dinov3_infer", "kernels"):
            compileall.compile_dir(path / folder, quiet=1)
    target = HERE / "records" / "two_checkouts.json"
    record = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    for what in args.what:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[what](checkouts, args.rounds, Path(folder))
        record[what] = dict(commits={name: commit(path) for name, path in checkouts.items()}, found=found)
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
