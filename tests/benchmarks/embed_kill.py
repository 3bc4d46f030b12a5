"""Kills embed at random moments, restarts it, and compares the output with that of an undisturbed run.

    python tests/benchmarks/embed_kill.py WEIGHTS

The input is 20,000 files: CIFAR-10 as PNG and JPEG, and crops of photographs in many sizes and modes, 1 % of them
broken in twenty ways; the output has shards of 200.  One run is undisturbed.  The other gets SIGKILL 20 times, and
SIGINT, SIGTERM or SIGHUP 20 times, each at a random moment after at least one new shard, and then runs to its end.
Both must hold every file once, with the same bytes of its vector and the same error.  The record goes to
records/embed_kill.json.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(ROOT), str(ROOT / "kernels"), str(HERE / "nano")]

from albums import BREAKAGES, write_album  # noqa: E402
from PIL import Image  # noqa: E402

from dinov3_infer.features.disk.formats import FORMATS  # noqa: E402

OTHERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START = "import sys; sys.path[:0] = sys.argv.pop(1).split('|'); from dinov3_infer.cli import main; sys.exit(main())"


def command(weights: Path, album: Path, out: str, shard_size: int, *options: str) -> list[str]:
    paths = f"{ROOT}|{ROOT / 'kernels'}"
    call = ["embed", str(album), "-o", out, "-m", str(weights), "--shard-size", str(shard_size), "--device", "cpu"]
    return [sys.executable, "-c", START, paths, *call, *options]


def shards(out: str) -> list[Path]:
    """The complete shards."""
    path = Path(out)
    folder = path if out.endswith("/") else path.with_name(f"{path.name}.parts")
    return sorted(folder.glob("[0-9]" * 6 + (path.suffix or ".npy")))


def killed(call: list[str], out: str, rng: random.Random, at_most: float, number: int) -> int:
    """Runs until there is a new shard and a random time longer, sends a signal; returns the number of new shards."""
    before = len(shards(out))
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(shards(out)) <= before:
        if process.poll() is not None:
            assert process.stderr is not None
            raise RuntimeError(f"ended before a new shard: {process.stderr.read().decode()[-500:]}")
        time.sleep(0.005)
    time.sleep(rng.random() * at_most)
    process.send_signal(number)
    said = process.communicate()[1]
    if number != signal.SIGKILL and process.returncode not in (0, 3, 128 + number):
        raise RuntimeError(f"signal {number} ended in {process.returncode}: {said.decode()[-500:]}")
    return len(shards(out)) - before


def contents(out: str) -> dict[str, tuple[bytes, str]]:
    """path -> (bytes of its vector, error).  Raises: ValueError if a path occurs twice."""
    path = Path(out)
    form = FORMATS[path.suffix or ".npy"]()
    found: dict[str, tuple[bytes, str]] = {}
    for file in shards(out) if out.endswith("/") else [path]:
        for vector, line in zip(form.vectors(file), form.lines(file), strict=True):
            if line.path in found:
                raise ValueError(f"'{line.path}' comes twice")
            found[str(line.path)] = vector.tobytes(), line.error
    return found


def experiment(
    weights: Path, album: Path, paths: list[Path], folder: Path, form: str, kills: int, shard_size: int,
    seed: int, *options: str, at_most: float = 2.0, others: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Both runs and their comparison.  `form`: of the output, such as ".npy" or "/"."""
    alone, disturbed = f"{folder}/alone{form}", f"{folder}/disturbed{form}"
    begun = time.perf_counter()
    subprocess.run(command(weights, album, alone, shard_size, *options), check=False, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - begun
    rng = random.Random(seed)
    call = command(weights, album, disturbed, shard_size, *options)
    signals = [signal.SIGKILL] * kills + [rng.choice(OTHERS) for _ in range(others)]
    rng.shuffle(signals)
    new = [killed(call, disturbed, rng, at_most, number) for number in signals]
    last = subprocess.run(call, capture_output=True, text=True)
    if last.returncode not in (0, 3):
        raise RuntimeError(last.stderr[-500:])
    first, second = contents(alone), contents(disturbed)
    left = [str(p.name) for p in Path(folder).rglob(".*.tmp*")]
    return dict(
        pictures=len(paths), shard_size=shard_size, kills=kills, new_shards_before_each_kill=new, output=form,
        signals=dict(Counter(number.name for number in signals)),
        seconds_undisturbed=round(seconds, 1), failed=sum(bool(error) for _, error in first.values()),
        kinds_of_errors=len(Counter(error.split("'")[-1][:40] for _, error in first.values() if error)),
        every_input_once=set(first) == {str(path) for path in paths}, equal=first == second, left_behind=left,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="weights file or folder of the model")
    parser.add_argument("--made-up", action="store_true", help="use images of noise, and download nothing")
    parser.add_argument("--count", type=int, default=20_000, help="number of images (default: 20000)")
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--others", type=int, default=20, help="number of signals that a run can handle (default: 20)")
    parser.add_argument("--shard-size", type=int, default=200, help="images per shard (default: 200)")
    parser.add_argument("--form", default="/", help="output: /, .npy, .safetensors, .parquet, .parquet/ (default: /)")
    parser.add_argument("--size", default="32", help="input size in pixels (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and kills (default: 0)")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "embed_kill.json", help="record to write")
    args = parser.parse_args()
    for number in OTHERS:  # a job in the background or under nohup ignores some, and the runs would inherit that
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    small, images = None, [Image.open(ROOT / "examples" / "cat.jpg").convert("RGB")]
    if not args.made_up:
        from evaluate import cifar10
        from fetch import photographs

        small, images = cifar10(args.count, 1)[0], list(photographs().values())
    with tempfile.TemporaryDirectory() as folder:
        paths = write_album(Path(folder) / "album", args.count, small, images, seed=args.seed)
        record = experiment(
            args.weights, Path(folder) / "album", paths, Path(folder), args.form, args.kills, args.shard_size,
            args.seed, "--size", args.size, "-j", "0", at_most=0.5, others=args.others,
        )  # fmt: skip
    record |= dict(ways_of_breaking=len(BREAKAGES), seed=args.seed)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    sys.exit(not (record["equal"] and record["every_input_once"] and not record["left_behind"]))


if __name__ == "__main__":
    main()
