"""Compares import time and cold start of two checkouts of this repository.

    OMP_NUM_THREADS=1 python tests/benchmarks/two_checkouts.py BEFORE AFTER [--rounds 15]

Each measurement is a process.  "import" is `from dinov3_infer import Backbone` after torch and numpy, in CPU time with
the garbage collector off; "first" is the wall time from the start of the process to the features of one photograph by
`nano`.  The rounds are interleaved, and the ratio is the median of the ratios of the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).resolve().parent
IMPORT = """
import gc, time, numpy, torch
gc.disable()
begun = time.process_time()
from dinov3_infer import Backbone
Backbone
print(time.process_time() - begun)
"""
FIRST = """
from dinov3_infer import Backbone
Backbone.from_pretrained("nano", device="cpu").extract_features("examples/cat.jpg")
"""


def measured(checkout: Path) -> dict[str, float]:
    """Seconds."""
    paths = os.pathsep.join((str(checkout), str(checkout / "kernels")))
    run = dict(cwd=checkout, env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", IMPORT], **run)  # type: ignore[call-overload]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", FIRST], **run)  # type: ignore[call-overload]
    return {"import": float(done.stdout), "first": time.perf_counter() - begun}


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the old version")
    parser.add_argument("after", type=Path, help="checkout of the new version")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default: 15)")
    args = parser.parse_args()
    checkouts = {"before": args.before.resolve(), "after": args.after.resolve()}
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(args.rounds + 1):
        rounds.append({name: measured(path) for name, path in checkouts.items()})
    rounds = rounds[1:]  # the first process compiles
    ratios = {what: sorted(r["after"][what] / r["before"][what] for r in rounds) for what in ("import", "first")}
    summary = {
        what: dict(ratio=round(median(found), 3), quartiles=[round(q, 3) for q in quantiles(found, n=4)[::2]])
        for what, found in ratios.items()
    }
    record = dict(commits={n: commit(p) for n, p in checkouts.items()}, after_by_before=summary, rounds_s=rounds)
    target = HERE / "records" / "two_checkouts.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
