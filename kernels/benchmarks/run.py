"""Everything about the kernels that only a GPU can show, in one command.

    python kernels/benchmarks/run.py                        # all parts, 25 minutes at most
    python kernels/benchmarks/run.py --short                # the most important parts, 560 seconds at most
    python kernels/benchmarks/run.py op backward            # some of them
    python kernels/benchmarks/run.py --dry-run --out /tmp/x # a rehearsal on a CPU: tiny sizes

Parts in order: the tests marked gpu, agreement of real weights (--weights), tuning, then the comparisons.  The short
run begins with parts that need no compiler: a few tests, models as users call them, the operator.

Each part runs in its own process, writes its record after every contestant and every round, and is ended when its share
of the time is up; started again with the same --out it continues where it stopped.  Later parts use the configurations
that tuning found.  A model whose plan is not used ends the run with an error.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECORDS = HERE / "records"
KERNELS = HERE.parent / "dinov3_infer_kernels"
PACKAGE = ROOT / "dinov3_infer"
# what the numbers depend on
MEASURED = (KERNELS, HERE, *(PACKAGE / place for place in ("model", "features/extractor.py", "cli/bench/contest.py")))
# part -> its share of the time; seconds if all of them have 25 minutes
PARTS = dict(tests=280, weights=40, tune=240, op=280, mixed=50, backward=130, model=360, training=120)
SHORT = dict(ceilings=25, smoke=50, eager=165, op=85, tune=70, compiled=150)
ALL = tuple(dict.fromkeys((*PARTS, *SHORT)))
SMOKE = "plan or one_size or graph"  # tests of a short run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(ALL))
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT)}: in 560 seconds")
    parser.add_argument("--out", type=Path, help="where the records go; kernels/benchmarks/records unless given")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, to see that everything runs")
    parser.add_argument("--deadline", type=float, help="seconds for all parts together; 1500, or 550 for a short run")
    parser.add_argument("--commit", help="the commit that is measured, if git is not there")
    parser.add_argument("--weights", help="a directory or file of real weights, for the part of that name")
    parser.add_argument("--part", choices=ALL, help=argparse.SUPPRESS)  # the process of one part
    args = parser.parse_args()
    if wrong := set(args.parts) - set(ALL):
        parser.error(f"parts are {', '.join(ALL)}; got {', '.join(sorted(wrong))}")
    args.deadline = args.deadline or (550.0 if args.short else 1500.0)
    if args.out is None and args.dry_run:
        parser.error("a rehearsal is no record: give --out")
    args.out = args.out or RECORDS
    args.out.mkdir(parents=True, exist_ok=True)
    return run_part(args) if args.part else run_all(args)


def run_all(args: argparse.Namespace) -> int:
    """The parts one after the other; a part that fails does not stop the others."""
    end, results = time.monotonic() + args.deadline, {}
    shares = SHORT if args.short else PARTS | {part: SHORT[part] for part in SHORT if part in args.parts}
    wanted = [part for part in shares if not args.parts or part in args.parts]
    for i, part in enumerate(wanted):
        share = shares[part] / sum(shares[other] for other in wanted[i:])  # of the time that is left
        left = (end - time.monotonic()) * share
        if left < 15:
            results[part] = "no time left"
            continue
        print(f"--- {part}, {left:.0f} seconds", flush=True)
        begun = time.monotonic()
        command = [*_again(args), "--part", part, "--deadline", str(left - 10)]
        if part in ("tests", "smoke"):
            command = _tests(part == "smoke")
        results[part] = _ended(command, left, _environment(args))
        print(f"--- {part}: {results[part]} after {time.monotonic() - begun:.0f} s", flush=True)
    print(json.dumps(results, indent=1))
    return int(any(result.startswith("exit") for result in results.values()))


def _ended(command: list[str], seconds: float, environment: dict[str, str]) -> str:
    """How a command ended; when its time is up, it and the processes that it started are killed."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)
    try:
        code = process.wait(seconds)
        return "done" if code == 0 else f"exit code {code}"
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, KeyboardInterrupt):
            raise
        return "ended: its time was up"


def _again(args: argparse.Namespace) -> list[str]:
    given = [sys.executable, str(HERE / "run.py"), "--out", str(args.out.resolve())]
    for name in ("commit", "weights"):
        given += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    return given + ["--dry-run"] * args.dry_run + ["--short"] * args.short


def _tests(few: bool = False) -> list[str]:
    """The command; test files that cannot be imported here do not stop the others."""
    options = "-m gpu -v --tb=short --durations=8 --continue-on-collection-errors -p no:cacheprovider"
    places = ["-k", SMOKE, "tests/kernels/test_gpu_plan.py", "tests/kernels/test_gpu.py"] if few else ["tests"]
    return [sys.executable, "-m", "pytest", *options.split(), *places]


def _environment(args: argparse.Namespace) -> dict[str, str]:
    found = dict(os.environ, PYTHONUNBUFFERED="1", KINETO_LOG_LEVEL="99")  # the profiler is quiet
    return found | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if args.dry_run else {})


# --- one part ------------------------------------------------------------------------------------------------------


def run_part(args: argparse.Namespace) -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    if args.dry_run:
        sys.path.append(str(ROOT / "tests"))
        import conftest  # noqa: F401  (lets a CUDA build of torchvision be imported beside a CPU build of torch)
    import torch

    from dinov3_infer.cli.bench.contest import Settings

    if not args.dry_run and not torch.cuda.is_available():
        print("this needs a GPU; --dry-run rehearses on the CPU")
        return 1
    torch.backends.cudnn.allow_tf32 = False  # a judge in float32 is one
    device = torch.device("cpu" if args.dry_run else "cuda")
    settings = Settings(device, rounds=2, least_ms=0.0) if args.dry_run else Settings(device)
    record = opened(args.out / f"{args.part}.json", args, settings)
    tuned = args.out / "tune.json"
    if args.part != "tune" and tuned.exists():
        import tune

        found = json.loads(tuned.read_text())
        if found["environment"]["kernels_sha256"] == record["environment"]["kernels_sha256"]:
            for entry in found["cells"]:
                tune.apply_entry(entry)
            record["environment"]["configurations"] = "as tuned in the same run"
    others = {"tune": tune_part, "weights": weights_part, "ceilings": ceilings_part}
    return others.get(args.part, compare_part)(args, settings, record) or 0


def opened(path: Path, args: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The record of this part, continued from an earlier run of the same source."""
    record = {"part": args.part, "dry_run": args.dry_run, "environment": environment(args, settings), "cells": []}
    if path.exists():
        earlier = json.loads(path.read_text())
        if all(earlier["environment"].get(k) == record["environment"][k] for k in ("source_sha256", "gpu")):
            record["cells"] = earlier["cells"]
    return record


def save(record: dict[str, Any], out: Path) -> None:
    """Whole or not at all, so that an end at any moment leaves a record that can be read."""
    path = out / f"{record['part']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)


def compare_part(args: argparse.Namespace, settings: Any, record: dict[str, Any]) -> int:
    """Cell after cell, as long as the time that the longest cell took so far is left.

    A cell that was ended before it was whole is measured again.
    """
    import measure
    import render
    import torch

    end, longest = time.monotonic() + args.deadline, 0.0
    record["cells"] = [cell for cell in record["cells"] if cell.get("whole", True)]
    whole = record["cells"]
    done = [cell["cell"] for cell in whole]
    for what, build in _plans(args, settings):
        if what in done:
            continue
        if time.monotonic() + longest > end:
            print(f"left out, since its time is up: {what}")
            continue
        torch._dynamo.reset()  # or it gives up after a few shapes
        begun, told = time.monotonic(), set[str]()

        def keep(cell: dict[str, Any], begun: float = begun, told: set[str] = told) -> None:
            seconds = round(time.monotonic() - begun, 1)
            save(record | {"cells": [*whole, cell | {"whole": False, "seconds": seconds}]}, args.out)
            for name in cell["contestants"].keys() - told:  # whose record is complete except for the rounds
                told.add(name)
                print(f"kept {args.part}: {json.dumps([cell['cell'], name])}", flush=True)

        cell = measure.contest(build(), settings, keep)
        longest = max(longest, time.monotonic() - begun)
        whole.append(cell | {"whole": True, "seconds": round(time.monotonic() - begun, 1)})
        save(record, args.out)
        print("\n".join(render.lines(whole[-1])), flush=True)
    without = [entry["refused"] for cell in whole for entry in cell["contestants"].values() if "refused" in entry]
    return int(any("no plan" in reason for reason in without))


def _plans(args: argparse.Namespace, settings: Any) -> Any:
    """The cells of a part: what names each, and a function that builds it."""
    if args.part in ("op", "mixed", "backward"):
        import operators

        if args.part == "op":
            return operators.forward_part(settings, args.short)
        return (operators.mixed_part if args.part == "mixed" else operators.backward_part)(settings)
    if args.part in ("eager", "compiled"):
        import users

        return (users.eager_part if args.part == "eager" else users.compiled_part)(settings)
    import models

    return (models.inference_part if args.part == "model" else models.training_part)(settings)


def ceilings_part(args: argparse.Namespace, settings: Any, record: dict[str, Any]) -> None:
    import users

    record["cells"] = [users.ceilings(settings)]
    save(record, args.out)
    print(record["cells"][0])


def tune_part(args: argparse.Namespace, settings: Any, record: dict[str, Any]) -> None:
    import tune

    record["cells"] = []
    for entry in tune.tune_part(settings, args.deadline, args.short):
        record["cells"].append(entry)
        save(record, args.out)
        print(tune.as_python([entry]), flush=True)


def weights_part(args: argparse.Namespace, settings: Any, record: dict[str, Any]) -> None:
    if not args.weights:
        print("no --weights given")
        return
    import models

    images = sorted((ROOT / "examples").glob("*.jpg"))
    record["cells"] = models.agreement(args.weights, images, settings)
    save(record, args.out)
    for row in record["cells"]:
        print(row)


# --- where it was measured -----------------------------------------------------------------------------------------


def environment(args: argparse.Namespace, settings: Any) -> dict[str, Any]:
    import torch
    from measure import clocks, smi

    found: dict[str, Any] = {"commit": args.commit or _commit()}
    found |= {"source_sha256": _sources(*MEASURED), "kernels_sha256": _sources(KERNELS)}
    found |= {"gpu": torch.cuda.get_device_name() if settings.cuda else platform.machine(), "configurations": "shipped"}
    found |= {"driver": smi("driver_version"), "clocks": clocks(settings)} if settings.cuda else {}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "timm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _sources(*places: Path) -> str:
    """SHA-256 of Python files, and of those in folders."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
