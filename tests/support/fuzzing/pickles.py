"""Damaged and hostile files of torch.save."""

import io
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CALLS = (
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", b"cos\nsystem\nX\x04\0\0\0true\x85R.", b"cbuiltins\neval\n",
    b"ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\1sb.", b"ctorch._utils\n_rebuild_tensor_v2\n)R.", b"0", b"h\xff",
    b"ccollections\nCounter\n)R.", b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", b"ctorch\nSize\n]K\1a\x85R.", b"(",
)  # fmt: skip


class Trap:
    """Unpickling it writes a file in the folder of the process."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("trap",)


def rough(draw: random.Random, content: bytes) -> bytes:
    """Damage at random, without regard to the structure."""
    kind = draw.randrange(5) if content else 3
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        length = draw.choice(
            (0, 1, 7, len(content) - 8, len(content) - 7, 2**22, 2**22 + 1, 2**27, 2**32, 2**63, 2**64 - 1)
        )
        return struct.pack("<Q", max(0, length)) + content[8:]
    if kind == 2:
        return content + draw.randbytes(draw.choice((1, 8, 999)))
    if kind == 3:
        return draw.choice((b"", b"<html>", b"version https://git-lfs", b"PK\3\4" + content, draw.randbytes(99), b"{}"))
    changed = bytearray(content)
    for _ in range(draw.choice((1, 3, 30))):
        changed[draw.randrange(min(len(changed), draw.choice((8, 300, len(changed)))))] = draw.randrange(256)
    return bytes(changed)


STRANGE: list[Callable[[], Any]] = [
    Trap, lambda: bytearray(99), lambda: torch.ones(2).to_sparse(), lambda: torch.ones(1).expand(2**40, 3), set, object,
    lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), lambda: torch.empty(4, device="meta"),
    lambda: torch.nn.Linear(2, 2), lambda: torch.ones(3, dtype=torch.complex64), lambda: [1] * 9999, lambda: Path("x"),
    lambda: torch.nn.Parameter(torch.ones(2)), lambda: "cls_token", lambda: torch.ones(()), lambda: torch.ones(0, 9),
]  # fmt: skip


def saved(draw: random.Random, content: bytes) -> bytes:
    """The same state dict with a strange value, or strangely nested."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    inner = state.get("teacher", state)
    name = draw.choice(list(inner))
    kind = draw.randrange(6)
    strange = draw.choice(STRANGE)
    if kind < 3:
        inner[draw.choice((name, name, "other", "a\nb", 3, None, (1, 2), "x." + name))] = strange()
    elif kind == 3:
        inner[name] = inner[name].flatten()[:1].expand(draw.choice((tuple(inner[name].shape), (2**50,), (1, 1, 2**62))))
    elif kind == 4:
        loop: dict[str, Any] = {}
        for i in range(12):
            loop[f"l{i}"] = loop
        inner["loop"] = loop
    else:
        state = draw.choice((strange(), [state], None, {"a": {"b": {"c": state}}, "d": state}))
    stream = io.BytesIO()
    try:
        torch.save(state, stream, _use_new_zipfile_serialization=draw.random() < 0.7)
    except (RuntimeError, NotImplementedError, pickle.PicklingError, AttributeError):
        torch.save({"x": 1}, stream)
    return stream.getvalue()


def zipped(draw: random.Random, content: bytes) -> bytes:
    """Members lost, changed, compressed, renamed; opcodes of the pickle changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {m.filename: archive.read(m) for m in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    kind, how = draw.randrange(6), zipfile.ZIP_STORED
    if kind == 0:
        del members[draw.choice(list(members))]
    elif kind == 1:
        how = zipfile.ZIP_DEFLATED
        members[draw.choice(list(members))] = bytes(2**22)
    elif kind == 2:
        name = draw.choice(list(members))
        members[draw.choice(("../../evil", "archive/DATA.PKL", "", name + "x"))] = members.pop(name)
    elif kind == 3:
        name = draw.choice(list(members))
        members[name] = members[name][: draw.randrange(len(members[name]) + 1)]
    else:
        members[pickled] = opcodes(draw, members[pickled])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def opcodes(draw: random.Random, content: bytes) -> bytes:
    """A pickle with opcodes lost, doubled or replaced by calls."""
    try:
        starts = [position for _, _, position in pickletools.genops(content) if position is not None]
    except Exception:
        return content
    for _ in range(draw.choice((1, 1, 3))):
        i = draw.randrange(len(starts) - 1)
        at, end = starts[i], starts[i + 1]
        kind = draw.randrange(4)
        if kind == 0:
            content = content[:at] + content[end:]
        elif kind == 1:
            content = content[:at] + draw.choice(CALLS) + content[at:]
        elif kind == 2:
            content = content[: at + 1] + draw.randbytes(max(0, min(8, end - at - 1))) + content[min(end, at + 9) :]
        else:
            content = content[:at] + draw.randbytes(1) + content[at + 1 :]
    return content
