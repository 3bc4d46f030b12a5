"""Runs cases in forked workers, each with a limit on its time and memory, and counts how they end.

A case ends well if it gives a result, or one of our errors with one sentence that holds no address.  It is a fault if
anything else is raised, if the process dies, if it takes more CPU time or memory than allowed, or if it writes a file.
"""

import ast
import json
import os
import random
import re
import resource
import selectors
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dinov3_infer
from dinov3_infer import Dinov3Error

SECONDS, PATIENCE = 5.0, 60.0  # of CPU, and of wall for what waits without computing
BYTES = 2**30  # above what the worker holds before its first case
PACKAGE = Path(dinov3_infer.__file__).parent
Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    name: str
    case: Callable[[random.Random, Path], tuple[Any, bool]]  # what to read, and whether its first bytes look right
    read: Callable[[Any, random.Random], None]
    corners: dict[str, Make]  # cases made by hand, which come first
    once_failed: tuple[tuple[int, int], ...]  # (seed, number), which come next
    branches: dict[str, tuple[str, ...]]  # module -> functions whose errors do not come from what is read

    def made(self, seed: int, number: int, folder: Path) -> tuple[Any, bool, random.Random]:
        corners = list(self.corners.values())
        if number < len(corners):
            return corners[number](folder), False, random.Random(number)
        number -= len(corners)
        if number < len(self.once_failed):
            seed, number = self.once_failed[number]
        else:
            number -= len(self.once_failed)
        draw = random.Random(f"{self.name} {seed} {number}")
        source, magic = self.case(draw, folder)
        return source, magic, draw


@cache
def raises(module: str, but: tuple[str, ...] = ()) -> dict[int, str]:
    """Line -> function and first words of every error that a module raises."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name in but:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                texts = [
                    n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                said = max((t for t in texts), key=len, default="")
                found[node.lineno] = f"{module.rpartition('/')[2]}.{function.name}: {said.strip()[:60]}"
    return found


def judge(error: BaseException) -> tuple[str, Any]:
    """The class of an error and the branches that raised it; for a fault, "fault" and its description."""
    if not isinstance(error, Dinov3Error):
        return "fault", "".join(traceback.format_exception(error)[-4:])[-1500:]
    text = str(error)
    if not text.isprintable() or len(text) > 2100 or re.search(r"(?<!\d)0x[0-9a-f]{6}", text):
        return "fault", f"not one sentence: {text!r}"
    if error.__context__ is not None and not error.__suppress_context__:
        return "fault", f"with the context {error.__context__!r}: {text}"
    branches, cause = [], error
    while isinstance(cause, Dinov3Error):  # an error may be put in the words of another
        frame, line = list(traceback.walk_tb(cause.__traceback__))[-1]
        file = Path(frame.f_code.co_filename)
        known = raises(file.relative_to(PACKAGE).with_suffix("").as_posix()) if PACKAGE in file.parents else {}
        branches.append(known.get(line, f"{file.stem}.{frame.f_code.co_name}"))
        cause = cause.__context__
    return type(error).__name__, branches


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> None:
    """Resets the peak memory if it lies far above the present use."""
    if _peak() - int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() > 2**24:
        Path("/proc/self/clear_refs").write_text("5")


def one(kind: Kind, seed: int, number: int, place: Path) -> list[Any]:
    """[number, looks right, class, branches, CPU seconds, MiB] of one case, run in this process in an empty folder."""
    folder, elsewhere = place / "case", place / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    os.chdir(elsewhere)
    try:
        source, magic, draw = kind.made(seed, number, folder)
        _forget_peak()
        before, started = _peak(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        ended: str
        branches: Any
        try:
            kind.read(source, draw)
            ended, branches = "read", []
        except BaseException as error:  # a panic of Rust code is no Exception
            ended, branches = judge(error)
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        spent, above = time.process_time() - started, _peak() - before
        if above > BYTES:
            ended, branches = "fault", f"took {above >> 20} MiB"
        written = {*os.listdir(place), *os.listdir(elsewhere)} - {folder.name, elsewhere.name}
        if written:
            ended, branches = "fault", f"wrote {written}"
    finally:
        os.chdir("/")
        shutil.rmtree(place)
        place.mkdir()
    return [number, magic, ended, branches, round(spent, 3), above >> 20]


def _work(kind: Kind, seed: int, numbers: Sequence[int], place: Path, pipe: int) -> None:
    for each in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(each, signal.SIG_DFL)  # which ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_peak() + 6 * BYTES,) * 2)  # so that a fault harms nobody else
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # C libraries print to it
    place.mkdir()
    for number in numbers:
        os.write(pipe, (json.dumps(one(kind, seed, number, place)) + "\n").encode())


def run(kind: Kind, count: int, seed: int, workers: int = 1) -> dict[str, Any]:
    """Runs the hand-made cases, those that once failed, and `count` drawn ones; returns their counts."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as root:  # here, since a worker may die
        return _run(kind, count, seed, workers, Path(root))


def _run(kind: Kind, count: int, seed: int, workers: int, root: Path) -> dict[str, Any]:
    total = len(kind.corners) + len(kind.once_failed) + count
    waiting = [list(range(total))[i::workers] for i in range(workers)]
    select, running = selectors.DefaultSelector(), {}
    results: list[list[Any]] = []

    def start(numbers: list[int]) -> None:
        if not numbers:
            return
        out, into = os.pipe()
        child = os.fork()
        if not child:
            try:
                _work(kind, seed, numbers, root / str(os.getpid()), into)
            except BaseException:
                os.write(into, (json.dumps([-1, False, "fault", traceback.format_exc()[-1500:], 0, 0]) + "\n").encode())
                os._exit(3)
            os._exit(0)
        os.close(into)
        select.register(out, selectors.EVENT_READ)
        running[out] = [child, numbers, b""]

    for numbers in waiting:
        start(numbers)
    while running:
        for key, _ in select.select():
            out = key.fd
            child, numbers, rest = running[out]
            chunk = os.read(out, 2**16)
            *lines, rest = (rest + chunk).split(b"\n")
            results += [json.loads(line) for line in lines]
            running[out][1:] = [numbers[len(lines) :], rest]
            if chunk:
                continue
            select.unregister(out)
            os.close(out)
            _, numbers, _ = running.pop(out)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                name = signal.Signals(os.WTERMSIG(status)).name
                what = {"SIGPROF": f"more than {SECONDS} s", "SIGALRM": f"waited for {PATIENCE} s"}.get(
                    name, f"died of {name}"
                )
                results.append([numbers[0], False, "fault", what, SECONDS, 0])
                start(numbers[1:])
    return _record(kind, seed, results, total)


def _record(kind: Kind, seed: int, results: list[list[Any]], total: int) -> dict[str, Any]:
    by_hand = len(kind.corners)
    drawn = [r for r in results if r[0] >= by_hand]
    hit = Counter(branch for _, _, ended, branches, *_ in results if ended != "fault" for branch in branches)
    known = [name for module, but in kind.branches.items() for name in raises(module, but).values()]
    names = list(kind.corners)
    return {
        "cases": len(results),
        "all ended": len(results) == total,
        "by hand": by_hand,
        "looks right": round(sum(r[1] for r in drawn) / max(1, len(drawn)), 3),
        "ends": dict(Counter(r[2] for r in results).most_common()),
        "branches": dict(sorted(hit.items())),
        "branches hit": len(set(known) & set(hit)),
        "branches not hit": sorted(set(known) - set(hit)),
        "slowest, CPU s": max((r[4] for r in results), default=0),
        "CPU s": round(sum(r[4] for r in results), 1),
        "most memory, MiB": max((r[5] for r in results), default=0),
        "faults": [
            {"case": names[r[0]] if 0 <= r[0] < by_hand else r[0], "what": r[3]} for r in results if r[2] == "fault"
        ],
    }
