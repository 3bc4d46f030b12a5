"""`dinov3-infer verify`: checks that weights are the ones that they claim to be."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from ..backbone import Backbone
from ..hub.locate import HubOptions, locate
from ..recorded import compute, difference, known
from ..system import sha256
from ..zoo import MODELS, ModelInfo, find
from .main import FAILED, OK, SKIPPED, say

__all__ = ["run"]

CLOSE = 1e-4  # relative distance; float32 differs by about 1e-6 between CPUs, wrong arithmetic by far more


@dataclass
class Findings:
    """The identity of the weights, if it was found, and the results of the checks."""

    identity: str | None = None
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Prints the checks and a verdict; returns 0 for known weights, 1 for wrong ones, 3 for unknown ones."""
    path, named = locate(args.weights, HubOptions())
    asked = find(args.model) if args.model else named
    # loading is strict: a missing, additional or misshapen tensor, or another architecture, is an error
    name, weights = (path, None) if asked is None else (asked.name, path)
    bb = Backbone.from_pretrained(name, weights=weights, device="cpu", dtype="float32", rope_periods="exact")
    found = Findings()
    found.checked.append(f"the tensors are exactly those of {bb.summary()}")
    _check_numbers(bb, found)
    _check_file(path, bb, asked, found)
    _check_weights(bb, asked, found)
    say(f"weights      {path}")
    for name, text in bb.origin.items():
        say(f"{'taken':<12} {name}: {text}")
    for title in ("checked", "not_checked", "wrong"):
        for line in getattr(found, title):
            say(f"{title.replace('_', ' '):<12} {line}")
    said = f"; they should be {asked.name}" if asked else ""
    if found.wrong:
        say(f"verdict      WRONG: a check failed{said}")
        return FAILED
    if found.identity:
        say(f"verdict      these are {found.identity}{said}")
        return OK
    say(f"verdict      no fault found, but these weights match no known fingerprint{said}")
    return SKIPPED


def _check_numbers(bb: Backbone, found: Findings) -> None:
    broken = [name for name, tensor in bb.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        found.wrong.append(f"{len(broken)} tensors hold NaN or infinity, such as {broken[0]}")
    else:
        found.checked.append("every number is finite")


def _check_file(path: Path, bb: Backbone, asked: ModelInfo | None, found: Findings) -> None:
    """Compares the start of the SHA-256 with the end of the file names of Meta's DINOv3 weights."""
    published = {(row.meta_file or "").rpartition("-")[2]: row for row in MODELS.values() if row.family == "dinov3"}
    if not path.is_file() or bb.config.position_grid is not None:
        found.not_checked.append("the file: only Meta's DINOv3 files have published hashes")
        return
    digest = sha256(path)
    row = published.get(digest[:8])
    if row is None and path.stem in (other.meta_file for other in published.values()):
        found.wrong.append(f"the file has the name of a file of Meta, but its SHA-256 begins with {digest[:8]}")
    elif row is None:
        found.not_checked.append(f"the file: its SHA-256 begins with {digest[:8]}, unlike all of Meta's DINOv3 files")
    elif asked in (None, row):
        found.identity = f"{row.name}, as Meta published it"
        found.checked.append(f"the SHA-256 begins with {digest[:8]}, like that of Meta's {row.meta_file}.pth")
    else:
        found.wrong.append(f"the SHA-256 belongs to Meta's {row.meta_file}.pth")


def _check_weights(bb: Backbone, asked: ModelInfo | None, found: Findings) -> None:
    """Compares the fingerprint, and the features of three images, with the recorded ones."""
    fingerprint, records = bb.fingerprint(), known()
    record = next((one for one in records if one.fingerprint == fingerprint), None)
    if record is None:
        found.not_checked.append(
            f"fingerprint and features: {fingerprint[:16]} is none of the {len(records)} known fingerprints"
        )
        return
    found.checked.append(f"the fingerprint {fingerprint[:16]} belongs to {record.what}")
    if asked is not None and asked.name != record.model:
        found.wrong.append(f"the weights are {record.what}")
    else:
        found.identity = found.identity or record.what
    distance = difference(compute(bb), record.vectors)
    line = f"the features of three images differ by {distance:.1e} from the recorded ones"
    if distance <= CLOSE:
        found.checked.append(line)
    else:
        found.wrong.append(f"{line}, so this installation computes wrong results")
