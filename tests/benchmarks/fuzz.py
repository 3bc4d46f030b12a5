"""Feeds damaged and hostile inputs of every kind to the readers; each must load or raise one plain sentence.

    OMP_NUM_THREADS=1 python tests/benchmarks/fuzz.py --images 100000 --checkpoints 100000 --addresses 3000 \\
        --tars 2500 --tables 1500 --probes 500 --seed 1

See tests/support/fuzzing.  The record, with the number of hits of every error branch, is written to records/fuzz.json;
a kind without cases keeps its entry.  The exit status is 1 if there is a fault, or if no case met an error branch of
the readers.  `--only checkpoints:17` runs one case again, by its number in the record, and prints its result.
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

import PIL
import pyarrow
import safetensors
import torch

HERE = Path(__file__).parent


def main() -> int:
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent / "support")]
    os.environ["HF_HUB_OFFLINE"] = "1"
    from fuzzing import runner
    from fuzzing.kinds import ADDRESS, CHECKPOINT, PICTURE, PROBE, TABLE, TAR

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="damaged images (default: 2000)")
    parser.add_argument("--checkpoints", type=int, default=2000, help="damaged checkpoints (default: 2000)")
    for name in ("addresses", "tars", "tables", "probes"):
        parser.add_argument(f"--{name}", type=int, default=300, help=f"damaged {name} (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="run a single case again")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "fuzz.json", help="record to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    counts = {
        PICTURE.name: args.images, CHECKPOINT.name: args.checkpoints, ADDRESS.name: args.addresses, TAR.name: args.tars,
        TABLE.name: args.tables, PROBE.name: args.probes,
    }  # fmt: skip
    kinds = {kind.name: kind for kind in (PICTURE, CHECKPOINT, ADDRESS, TAR, TABLE, PROBE)}
    if args.only:
        name, _, number = args.only.partition(":")
        with tempfile.TemporaryDirectory() as place:
            Path(place, "one").mkdir()
            print(*runner.one(kinds[name], args.seed, int(number), Path(place, "one")), sep="\n")
        return 0
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    about = {
        "seed": args.seed,
        "allowed": {"CPU s": runner.SECONDS, "wall s": runner.PATIENCE, "MiB": runner.BYTES >> 20},
        "environment": {"python": platform.python_version(), "pillow": PIL.__version__, "torch": torch.__version__,
                        "safetensors": safetensors.__version__, "pyarrow": pyarrow.__version__},
    }  # fmt: skip
    good = True
    for kind in (kind for kind in kinds.values() if counts[kind.name]):
        started = time.perf_counter()
        found = runner.run(kind, counts[kind.name], args.seed, args.workers)
        found["wall s"] = round(time.perf_counter() - started, 1)
        record[kind.name] = about | found
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        good &= found["all ended"] and not found["faults"] and not found["branches not hit"]
        shown = {name: value for name, value in found.items() if name != "branches"}
        print(kind.name, json.dumps(shown, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
