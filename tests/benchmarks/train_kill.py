"""Kills training runs and damages their folders; a run must end with the same weights, or name the fault.

    python tests/benchmarks/train_kill.py

A model with the architecture of nano trains 48 steps on 64 images of noise.  One run is undisturbed; the other is
killed with SIGKILL 12 times, at a random moment after a new checkpoint, and resumed each time.  Both must end with the
same weights.  Then the folder of a half-finished run is damaged in 12 ways, and the run is resumed.  The result is
"told" if a message names the file, and "mended" if the final weights are the same.  The record goes to
records/train_kill.json.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

SMALL = [
    "--model",
    "nano",
    "--from-scratch",
    "--global-px",
    "32",
    "--local-px",
    "16",
    "--num-local",
    "2",
    "--batch-size",
    "8",
    "--checkpoint-steps",
    "3",
    "--log-steps",
    "1",
    "--health-pictures",
    "16",
    "--health-steps",
    "1000",
    "--dino-prototypes",
    "64",
    "--ibot-prototypes",
    "64",
    "--head-hidden",
    "32",
    "--head-bottleneck",
    "16",
    "--spread-group",
    "8",
    "--workers",
    "0",
    "--steps",
    "48",
    "--device",
    "cpu",
    "--no-stop-on-collapse",
]


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "dinov3_infer", "train", *map(str, options)]


def run(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*options), capture_output=True, text=True)


def newest(folder: Path) -> int:
    return max((int(p.name) for p in (folder / "checkpoints").glob("[0-9]*")), default=0)


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "backbone" / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def killed(folder: Path, data: Path, rng: random.Random) -> tuple[int, int]:
    """(newest checkpoint before, at the kill)"""
    before = newest(folder)
    options = ["--resume"] if before else ["--data", data, *SMALL]
    process = subprocess.Popen(
        command("--out", folder, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while newest(folder) <= before:
        if process.poll() is not None:
            assert process.stderr is not None
            raise RuntimeError(process.stderr.read()[-500:])
        time.sleep(0.002)
    time.sleep(rng.random() * 0.3)
    process.kill()
    process.wait()
    return before, newest(folder)


def _put(**values: Any) -> Callable[[bytes, random.Random], bytes | None]:
    return lambda content, _: json.dumps(json.loads(content) | values).encode()


def _flip(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) // 2, len(content))
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


STATE, TENSORS, CONFIG, METRICS = "{}/state.json", "{}/tensors.safetensors", "config.json", "metrics.jsonl"
WAYS: list[tuple[str, str, Callable[[bytes, random.Random], bytes | None]]] = [
    ("state cut", STATE, lambda c, _: c[: len(c) // 2]),
    ("state empty", STATE, lambda *_: b""),
    ("state gone", STATE, lambda *_: None),
    ("state of another step", STATE, _put(step=7)),
    ("state of another run", STATE, _put(data="0" * 64)),
    ("tensors cut", TENSORS, lambda c, _: c[:-100]),
    ("bit of the tensors", TENSORS, _flip),
    ("tensors gone", TENSORS, lambda *_: None),
    ("settings cut", CONFIG, lambda c, _: c[: len(c) // 2]),
    ("a setting of another kind", CONFIG, _put(steps="48")),
    ("another seed", CONFIG, _put(seed=3)),
    ("metrics damaged", METRICS, lambda c, _: c[:50] + b"\n" + c[50:]),
]


def damaged(half: Path, alone: Path, folder: Path, rng: random.Random) -> list[dict[str, str]]:
    found = []
    for way, name, change in WAYS:
        shutil.copytree(half, folder)
        config = json.loads((folder / "config.json").read_text()) | {"out": str(folder)}
        (folder / "config.json").write_text(json.dumps(config))
        path = folder / name.format(f"checkpoints/{newest(half):08d}")
        content = change(path.read_bytes(), rng)
        path.unlink() if content is None else path.write_bytes(content)
        ran = run("--out", folder, "--resume")
        said = [line for line in ran.stderr.splitlines() if line.startswith("dinov3-infer: ")]
        names = any(part in line for line in said for part in (path.name, path.parent.name, str(folder)))
        mended = ran.returncode == 0 and same(alone, folder)
        outcome = "told" if names and "fault of" not in ran.stderr else "mended" if mended else "silent"
        found.append(dict(way=way, outcome=outcome, status=str(ran.returncode), ended_equal=str(mended)))
        print(found[-1], said[-1:], flush=True)
        shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="number of kills (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default: 0)")
    parser.add_argument("--out", type=Path, default=HERE / "records" / "train_kill.json", help="record to write")
    args = parser.parse_args()
    rng, made = random.Random(args.seed), np.random.default_rng(args.seed)
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        (top / "images").mkdir()
        for i in range(64):
            Image.fromarray(made.integers(0, 255, (72, 72, 3), np.uint8)).save(top / "images" / f"{i:02d}.png")
        first = run("--out", top / "alone", "--data", top / "images", *SMALL)
        if first.returncode:
            raise RuntimeError(first.stderr[-500:])
        kills = []
        for number in range(args.kills):
            kills.append(killed(top / "killed", top / "images", rng))
            print(kills[-1], flush=True)
            if number == args.kills // 2:
                shutil.copytree(top / "killed", top / "half")
        last = run("--out", top / "killed", "--resume")
        if last.returncode:
            raise RuntimeError(last.stderr[-500:])
        steps = [[json.loads(line)["step"] for line in (top / name / "metrics.jsonl").read_text().splitlines()]
                 for name in ("alone", "killed")]  # fmt: skip
        record = dict(
            seed=args.seed, images=64, steps=48, kills=len(kills), checkpoints_before_and_at_each_kill=kills,
            same_weights=same(top / "alone", top / "killed"), every_step_once=steps[0] == steps[1],
            left_behind=[p.name for p in (top / "killed").rglob(".*")],
            damage=damaged(top / "half", top / "alone", top / "damaged", rng),
        )  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    silent = [case for case in record["damage"] if case["outcome"] == "silent"]  # type: ignore[attr-defined]
    sys.exit(bool(silent or not record["same_weights"] or not record["every_step_once"] or record["left_behind"]))


if __name__ == "__main__":
    main()
