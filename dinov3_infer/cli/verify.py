"""`dinov3-infer verify`: are these weights what they are said to be?"""

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

CLOSE = 1e-4  # relative distance: float32 on different CPUs is about 1e-6 apart, wrong arithmetic far more


@dataclass
class Findings:
    """What the weights are, as far as that could be found out."""

    identity: str | None = None
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    path, named = locate(args.weights, HubOptions())
    asked = find(args.model) if args.model else named
    # strict: a tensor that is missing, left over or of another shape is an error, and so is another architecture
    name, weights = (path, None) if asked is None else (asked.name, path)
    bb = Backbone.from_pretrained(name, weights=weights, device="cpu", dtype="float32", rope_periods="exact")
    found = Findings()
    found.checked.append(f"every tensor of {bb.summary()} is there, and no other")
    _check_numbers(bb, found)
    _check_file(path, bb, asked, found)
    _check_weights(bb, asked, found)
    say(f"weights      {path}")
    for name, text in bb.origin.items():
        say(f"{'taken':<12} {name}: {text}")
    for title in ("checked", "not_checked", "wrong"):
        for line in getattr(found, title):
            say(f"{title.replace('_', ' '):<12} {line}")
    said = f"; they were said to be {asked.name}" if asked else ""
    if found.wrong:
        say(f"verdict      NOT what they should be{said}")
        return FAILED
    if found.identity:
        say(f"verdict      these are {found.identity}{said}")
        return OK
    say(f"verdict      nothing speaks against these weights, and nothing proves them{said}")
    return SKIPPED


def _check_numbers(bb: Backbone, found: Findings) -> None:
    broken = [name for name, tensor in bb.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        found.wrong.append(f"{len(broken)} tensors hold NaN or infinity, the first is {broken[0]}")
    else:
        found.checked.append("every number is finite")


def _check_file(path: Path, bb: Backbone, asked: ModelInfo | None, found: Findings) -> None:
    """The SHA-256 of Meta's DINOv3 files begins with what their names end in."""
    published = {(row.meta_file or "").rpartition("-")[2]: row for row in MODELS.values() if row.family == "dinov3"}
    if not path.is_file() or bb.config.position_grid is not None:
        found.not_checked.append("the file: hashes are published of Meta's own DINOv3 files only")
        return
    digest = sha256(path)
    row = published.get(digest[:8])
    if row is None and path.stem in (other.meta_file for other in published.values()):
        found.wrong.append(f"the file has the name of one of Meta's, and its SHA-256 begins with {digest[:8]}")
    elif row is None:
        found.not_checked.append(f"the file: its SHA-256 begins with {digest[:8]}, as none of Meta's DINOv3 files does")
    elif asked in (None, row):
        found.identity = f"{row.name}, as Meta published it"
        found.checked.append(f"the SHA-256 begins with {digest[:8]}, as that of Meta's {row.meta_file}.pth")
    else:
        found.wrong.append(f"the SHA-256 is that of Meta's {row.meta_file}.pth")


def _check_weights(bb: Backbone, asked: ModelInfo | None, found: Findings) -> None:
    """Weights that were seen before, by fingerprint, and what they make of three images."""
    fingerprint, records = bb.fingerprint(), known()
    record = next((one for one in records if one.fingerprint == fingerprint), None)
    if record is None:
        found.not_checked.append(
            f"fingerprint and features: {fingerprint[:16]} is none of the {len(records)} that are known here"
        )
        return
    found.checked.append(f"the fingerprint, {fingerprint[:16]}, is that of {record.what}")
    if asked is not None and asked.name != record.model:
        found.wrong.append(f"they are {record.what}")
    else:
        found.identity = found.identity or record.what
    distance = difference(compute(bb), record.vectors)
    line = f"features of three images, {distance:.1e} from the recorded ones"
    if distance <= CLOSE:
        found.checked.append(line)
    else:
        found.wrong.append(f"{line}: this installation computes wrongly")
