"""Damaged and hostile files of fitted probes."""

import json
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dinov3_infer import Backbone
from dinov3_infer.tasks import KNN, AttentiveProbe, LinearProbe, LogisticProbe
from dinov3_infer.tasks.fitted import Fitted

from .checkpoints import config, joined, lying, split
from .pickles import rough

WIDTH = 192
KEY = "dinov3_infer"


@cache
def _backbone() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


@cache
def wholes() -> list[bytes]:
    made = []
    draw = torch.Generator().manual_seed(0)
    features, targets = torch.randn(12, WIDTH, generator=draw), torch.arange(12) % 3
    patches = torch.randn(12, 4, WIDTH, generator=draw)
    with tempfile.TemporaryDirectory() as place:
        for probe in (KNN(k=2), LinearProbe(steps=3), LogisticProbe(C=1.0, max_iter=3), AttentiveProbe(epochs=1)):
            learnt = probe.fit(patches if isinstance(probe, AttentiveProbe) else features, targets)
            made.append(learnt.save(Path(place, "x"), _backbone(), pooling="mean", size=64).read_bytes())
    return made


def _entries(draw: random.Random, content: bytes) -> bytes:
    """Changes settings, options and kinds."""
    header, data = split(content)
    stored = json.loads(header["__metadata__"][KEY])
    strange = draw.choice((None, "x", -1, 0, 10**30, 0.5, 1e300, [], {}, [1, "x"], True, "KNN", "AttentiveProbe"))
    kind = draw.randrange(4)
    if kind == 0 and stored["settings"]:
        stored["settings"][draw.choice(list(stored["settings"]))] = strange
    elif kind == 1:
        stored[draw.choice(list(stored))] = strange
    elif kind == 2:
        stored["settings"]["other"] = strange
    text = json.dumps(stored) if kind < 3 else config(draw, json.dumps(stored).encode()).decode("utf-8", "replace")
    header["__metadata__"][KEY] = text
    return joined(json.dumps(header), data)


def _tensors(draw: random.Random, content: bytes) -> bytes:
    """Changes shapes, dtypes and values in a valid file."""
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    shape, start, end = entry["shape"], *entry["data_offsets"]
    kind = draw.randrange(5)
    if kind == 0:
        entry["shape"] = draw.choice((shape[::-1], [1, *shape], [*shape, 1], [len(data[start:end]) // 4]))
    elif kind == 1:
        entry["dtype"] = draw.choice(("I32", "U32", "F32", "I64"))
    elif kind == 2:
        number = draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"))
        data = data[:start] + number * ((end - start) // 4) + data[end:]
    elif kind == 3:
        other = draw.choice((*names, "other"))
        header[other], header[name] = header[name], header.get(other, entry)
    else:
        at = start + 4 * draw.randrange(max(1, (end - start) // 4))
        data = data[:at] + struct.pack("<f", draw.choice((1e38, -1e38, float("nan"), 0.0))) + data[at + 4 :]
    return joined(json.dumps(header), data)


def case(draw: random.Random, folder: Path) -> tuple[Any, bool]:
    content = draw.choice(wholes())
    for _ in range(draw.choice((1, 1, 2))):
        try:
            content = draw.choice((_entries, _entries, _tensors, _tensors, lying, rough))(draw, content)
        except Exception:  # it was damaged already
            content = rough(draw, content)
    path = folder / draw.choice(("probe.safetensors", "x", "caf\u00e9"))
    path.write_bytes(content)
    return path, content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content) - 8


def read(source: Path, draw: random.Random) -> None:
    """Loads a probe, which must predict existing classes and shares that sum to 1."""
    probe: Any = Fitted.load(source, _backbone())
    patches = isinstance(probe, AttentiveProbe)
    width = probe.tensors[probe.names[0]].shape[-1]
    shares = probe.predict_proba(torch.ones(2, 4, width) if patches else torch.ones(2, width))
    assert shares.ndim == 2 and len(shares) == 2
