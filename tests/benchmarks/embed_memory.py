"""Checks that the memory of embed does not grow with the number of images: 2,000 and 20,000, each in a process.

    python tests/benchmarks/embed_memory.py

The model has random weights.  The peak of the larger run may exceed that of the smaller one by 50 MB plus the size of
the file names.  The record goes to records/embed_memory.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from albums import write_album  # noqa: E402
from embed_kill import command  # noqa: E402
from made_from import commit  # noqa: E402

from dinov3_infer import Backbone  # noqa: E402

RUN = """
import resource, sys
sys.path[:0] = sys.argv.pop(1).split("|")
from dinov3_infer.cli import main
assert main() in (0, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(call: list[str]) -> int:
    """Peak memory of the process, in bytes."""
    done = subprocess.run([call[0], "-c", RUN, *call[3:]], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vits16", help="model (default: vits16)")
    parser.add_argument(
        "--counts", type=int, nargs=2, default=(2_000, 20_000), help="numbers of images (default: 2000 20000)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "records" / "embed_memory.json", help="record to write")
    args = parser.parse_args()
    peaks, names = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        weights = Backbone.from_config(args.model, seed=0).save_pretrained(Path(scratch) / "weights")
        for count in args.counts:
            album = Path(scratch) / str(count)
            names = sum(len(str(path)) for path in write_album(album, count))
            peaks.append(peak(command(weights, album, f"{scratch}/{count}.npy", 1000, "--size", "64")))
            shutil.rmtree(album)
    record = dict(
        commit=commit(), model=args.model, counts=list(args.counts), peak_bytes=peaks, bytes_of_names=names,
        within=peaks[1] <= peaks[0] + 50e6 + names,
    )  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    sys.exit(not record["within"])


if __name__ == "__main__":
    main()
