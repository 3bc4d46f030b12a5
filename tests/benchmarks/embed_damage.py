"""Damages finished outputs of embed in 14 ways, in three formats, and checks that no damage goes unnoticed.

    python tests/benchmarks/embed_damage.py

nano embeds 60 images of noise.  Each file of an output (vectors, list, record) is then damaged in each way, at random
places, and the same call runs again.  The result is "mended" if all bytes equal those before the damage, "told" if the
call ends with an error of this package that names the output, and "silent" otherwise.  `Store(verify=True)` is checked
too.
The record goes to records/embed_damage.json.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from dinov3_infer import Backbone, Dinov3Error, Store  # noqa: E402

OPTIONS: dict[str, Any] = dict(size=32, shard_size=20, batch_size=10, progress=False)


def _flip(content: bytes, rng: random.Random, low: float, high: float) -> bytes:
    at = int(rng.uniform(low, high) * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _zeroed(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(max(1, len(content) - 64))
    return content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]


def _swapped(content: bytes, rng: random.Random) -> bytes:
    half, piece = len(content) // 2, min(64, len(content) // 4)
    return (
        content[: half - piece] + content[half : half + piece] + content[half - piece : half] + content[half + piece :]
    )


# content -> damaged content; None removes the file
BYTES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "cut by a byte": lambda c, _: c[:-1],
    "cut in the middle": lambda c, _: c[: len(c) // 2],
    "cut by a row": lambda c, _: c[:-768],
    "cut at the front": lambda c, _: c[8:],
    "empty": lambda *_: b"",
    "gone": lambda *_: None,
    "longer": lambda c, _: c + b"\0" * 16,
    "twice": lambda c, _: c + c,
    "bit in the head": lambda c, rng: _flip(c, rng, 0, 0.02),
    "bit in the middle": lambda c, rng: _flip(c, rng, 0.2, 0.8),
    "bit at the end": lambda c, rng: _flip(c, rng, 0.98, 1),
    "64 zeros": _zeroed,
    "all zeros": lambda c, _: bytes(len(c)),
    "pieces swapped": _swapped,
}


def whole_of(out: Path) -> dict[Path, bytes]:
    found = out.iterdir() if out.is_dir() else out.parent.glob(f"{out.stem}.*")
    return {path: path.read_bytes() for path in found if path.is_file()}


def outcome(call: Callable[[], object], out: Path, whole: dict[Path, bytes]) -> str:
    try:
        call()
    except Dinov3Error as error:
        return "told" if out.stem in str(error) else f"told without a name: {error}"
    except Exception as error:  # noqa: BLE001
        return f"escaped: {type(error).__name__}"
    return "mended" if whole_of(out) == whole else "silent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random damage (default: 0)")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "embed_damage.json", help="record to write")
    args = parser.parse_args()
    bb, rng, made = Backbone.from_pretrained("nano", device="cpu"), random.Random(args.seed), np.random.default_rng(0)
    counts: dict[str, Counter[str]] = {}
    opened: Counter[str] = Counter()
    wrong: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        (top / "album").mkdir()
        for i in range(60):
            pixels = made.integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(top / "album" / f"{i:02d}.png")
        for form in (".npy", ".safetensors", ".parquet"):
            for kind, name in (("file", f"made-{form[1:]}{form}"), ("folder", f"folder{form}/")):
                out = top / name
                given = f"{top}/{name}"
                bb.embed(top / "album", given, **OPTIONS)
                whole = whole_of(out)
                for path in whole:
                    for way, change in BYTES.items():
                        damaged = change(whole[path], rng)
                        if damaged == whole[path]:
                            continue
                        path.unlink() if damaged is None else path.write_bytes(damaged)
                        seen = outcome(lambda out=out: Store(out, verify=True), out, {})  # type: ignore[misc]
                        opened["told" if seen.startswith("told") else "taken"] += 1
                        found = outcome(lambda given=given: bb.embed(top / "album", given, **OPTIONS), out, whole)  # type: ignore[misc]
                        counts.setdefault(f"{kind} {form}", Counter())[found] += 1
                        if found not in ("told", "mended"):
                            wrong.append([kind, path.name, way, found])
                        shutil.rmtree(f"{out}.parts", ignore_errors=True)
                        for old in whole_of(out):
                            old.unlink()
                        for old, content in whole.items():
                            old.write_bytes(content)
                print(kind, form, dict(counts[f"{kind} {form}"]), flush=True)
    record = dict(seed=args.seed, images=60, ways=list(BYTES), reruns=counts, opened=opened, neither=wrong)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(wrong, indent=1), dict(opened))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
