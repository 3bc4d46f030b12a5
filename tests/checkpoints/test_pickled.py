"""Files of torch.save are read; calls that torch.save does not write are refused before torch runs them."""

import argparse
import io
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint

from dinov3_infer import Backbone, CheckpointError
from dinov3_infer.checkpoints import pickled
from dinov3_infer.checkpoints.pickled import NotPlainError, check_calls
from dinov3_infer.checkpoints.reading import open_checkpoint

STATE = {"cls_token": torch.ones(1, 1, 4), "half": torch.ones(3, dtype=torch.float16)}


class Odd(torch.Tensor):
    """A tensor class that torch does not know."""


def _optimizer() -> dict[str, Any]:
    layer = torch.nn.Linear(3, 2)
    solver = torch.optim.AdamW(layer.parameters())
    steps = torch.optim.lr_scheduler.MultiStepLR(solver, [3, 5])
    layer(torch.ones(1, 3)).sum().backward()
    solver.step()
    return {"optimizer": solver.state_dict(), "schedule": steps.state_dict()}


def _with_attribute() -> torch.nn.Parameter:
    found = torch.nn.Parameter(torch.ones(2))
    found.is_distributed = False  # type: ignore[attr-defined]  # as FSDP and Megatron leave it
    return found


PLAIN: dict[str, Callable[[], Any]] = {
    "a state": lambda: STATE,
    "a state of a module": lambda: torch.nn.BatchNorm1d(3).state_dict(),
    "parameters": lambda: OrderedDict(a=torch.nn.Parameter(torch.ones(2)), b=_with_attribute()),
    "an optimiser": _optimizer,
    "arguments": lambda: {"args": argparse.Namespace(lr=0.1, out="x", sizes=[1, 2], flag=None), "epoch": 3},
    "plain values": lambda: {"a": 1, "b": 2.5, "c": None, "d": True, "e": "x", "f": (1, (2,)), "g": [{}], "h": 2**70},
    "bytes": lambda: {"a": b"", "b": b"\xff\x00" * 99, "c": [b"x"] * 5},
    "sets and counters": lambda: {"a": {1, 2, "x"}, "b": Counter("aab"), "c": 1 + 2j, "d": {(1, "a"): 2, 3: 4}},
    "formats, devices, sizes": lambda: [torch.float32, torch.device("cpu"), torch.Size([2, 3]), torch.strided],
    "views of one storage": lambda: dict(zip("abcd", torch.arange(8.0).split(2), strict=True)),
    "stretched": lambda: {"a": torch.ones(1).expand(2**40)},
    "number formats": lambda: [torch.ones(2, dtype=d) for d in (torch.bool, torch.int8, torch.bfloat16, torch.cfloat)],
    "sparse": lambda: {"a": torch.eye(3).to_sparse(), "b": torch.eye(3).to_sparse_csr()},
    "quantised": lambda: {"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)},
    "nowhere": lambda: {"a": torch.empty(2**40, device="meta")},
    "a new number format": lambda: {"a": torch.ones(3, dtype=torch.uint16), "b": torch.ones(3).to(torch.float8_e4m3fn)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of sparse and quantised tensors
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as it once was"])
@pytest.mark.parametrize("kind", PLAIN)
def test_what_torch_saves_is_read(kind: str, zipped: bool, tmp_path: Path) -> None:
    """Everything that torch loads with weights_only=True is accepted."""
    path = tmp_path / "x.pth"
    try:
        torch.save(PLAIN[kind](), path, _use_new_zipfile_serialization=zipped)
        with torch.serialization.safe_globals([argparse.Namespace]):
            torch.load(path, weights_only=True)
    except Exception as error:
        pytest.skip(f"torch does not: {error!r}"[:80])
    check_calls(path, zipped)


@pytest.mark.parametrize("zipped, core", [(True, ""), (False, "numpy.core"), (False, "numpy._core")])
def test_numbers_of_numpy_beside_weights(zipped: bool, core: str, tmp_path: Path) -> None:
    """As runs of OpenMMLab keep their best score, written by NumPy 1 or 2: read, and nothing of NumPy is called."""
    numbers = {"best": np.float64(0.5), "seed": np.int64(3), "flag": np.bool_(True), "half": np.float16(2)}
    path = tmp_path / "x.pth"
    torch.save({"meta": numbers, "state_dict": STATE}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    if not zipped:  # of a zip the checksums would not fit
        content = re.sub(rb"numpy\._?core\.", f"{core}.".encode(), content)
    path.write_bytes(content)
    check_calls(path, zipped)
    found = open_checkpoint(path).tensors
    assert found.shapes == {f"state_dict.{name}": tuple(tensor.shape) for name, tensor in STATE.items()}
    assert torch.equal(found.read("state_dict.half"), STATE["half"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as it once was"])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), (lambda: bytearray(9), "bytearray"),
        (lambda: Path("x"), "pathlib"), (lambda: torch.Generator(), "torch"), (lambda: frozenset({1}), "frozenset"),
        (lambda: torch.ones(2).as_subclass(Odd), "test_pickled.Odd"), (lambda: torch.ones(2).numpy(), "numpy"),
        (lambda: {torch.float32: 1, ((((1,),),),): 2}, "a key of something else"), (lambda: range(3), "range"),
        (lambda: torch.FloatStorage(3), "storage"), (lambda: slice(3), "builtins.slice"),
    ],
)  # fmt: skip
def test_objects_are_named(make: Callable[[], Any], name: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    try:
        torch.save({"x": make()}, path, _use_new_zipfile_serialization=zipped)
    except Exception as error:
        pytest.skip(f"torch does not save it: {error!r}"[:80])
    if name == "storage":  # which is no object but what lies below tensors
        return check_calls(path, zipped)
    text = complaint(CheckpointError, lambda: Backbone.from_pretrained(path))
    assert name in text and "objects besides tensors" in text


# Written opcode by opcode


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def tup(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(count: int = 4, key: str = "0") -> bytes:
    return tup(text("storage"), named("torch.FloatStorage"), text(key), text("cpu"), number(count)) + b"Q"


def tensor(size: int = 4, stride: int = 1, count: int = 4) -> bytes:
    hooks = called("collections.OrderedDict")
    return called(
        "torch._utils._rebuild_tensor_v2", storage(count), number(0), tup(number(size)), tup(number(stride)), b"\x89",
        hooks,
    )  # fmt: skip


WIDE = tensor(1 << 34, 0)
SPARSE = called("torch.serialization._get_layout", text("torch.sparse_coo"))
KEPT, AGAIN = b"q\x05", b"h\x05"  # in the memo, and from there
MANY = 20_000
ASKED: dict[str, bytes] = {
    "a stretched tensor made whole": called("torch._utils._rebuild_device_tensor_from_cpu_tensor", WIDE),
    "a set of one": called("builtins.set", WIDE),
    "a set of a set of one": called("builtins.set", b"]" + tup(WIDE) + b"a"),
    "a dictionary of one": called("collections.OrderedDict", WIDE),
    "a counter of one": called("collections.Counter", WIDE),
    "a size of one": called("torch.Size", WIDE),
    "a tensor by its size": called("torch.FloatTensor", number(1 << 36)),
    "on a GPU": called("torch.cuda.FloatTensor", number(1 << 36)),
    "a storage by its size": called("torch.storage.UntypedStorage", number(1 << 36)),
    "a typed storage": called("torch.FloatStorage", number(1 << 36)),
    "a bytearray": called("builtins.bytearray", number(1 << 36)),
    "a bytearray of Python 2": called("__builtin__.bytearray", number(1 << 36)),
    "a bytearray as an opcode": b"\x96" + struct.pack("<Q", 1 << 40),
    "bytes of 1 TiB": b"\x8e" + struct.pack("<Q", 1 << 40),
    "a number of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "text of 4 GiB": b"X" + struct.pack("<I", 2**32 - 1),
    "a frame of 2^60 bytes": b"\x95" + struct.pack("<Q", 1 << 60),
    "bytes that double": b"".join([named("_codecs.encode") + b"("] * 30) + text("A" * 99) + (text("hex") + b"tR") * 30,
    "another encoding": called("_codecs.encode", text("A" * 99), text("utf-32")),
    "the same text many times": b"]" + text("A" * 50_000) + KEPT + b"0"
    + (b"(" + called("_codecs.encode", AGAIN, text("latin1")) + b"e") * MANY,
    "the same list many times": b"](" + number(1) * 5000 + b"e" + KEPT + b"0]"
    + (called("builtins.set", AGAIN) + b"a") * MANY,
    "the same size many times": tup(*[number(1)] * 5000) + KEPT + b"0]" + (called("torch.Size", AGAIN) + b"a") * MANY,
    "the same attributes many times": b"}(" + b"".join(text(f"a{i}") + b"N" for i in range(5000)) + b"u" + KEPT + b"0]"
    + (called("collections.OrderedDict") + AGAIN + b"ba") * MANY,
    "the indices of a sparse tensor": called(
        "torch._utils._rebuild_sparse_tensor", SPARSE, tup(WIDE, WIDE, called("torch.Size", tup(number(9))), b"\x88")
    ),
    "a quantised tensor of more than it stores": called(
        "torch._utils._rebuild_qtensor", storage(), number(0), tup(number(1 << 36)), tup(number(1)), tup(), b"\x89"
    ),
    "storages of more than is there": tensor(4, 1, 1 << 40),
    "many storages of all that is there": b"]" + b"".join(storage(1000, str(i)) + b"a" for i in range(MANY)),
    "more numbers, by attributes": storage() + b"}" + text("count") + number(1 << 60) + b"sb",
    "a tensor with attributes": tensor() + b"}" + text("stored") + b"\x88sb",
    "a tensor that is something else": called("torch._utils._rebuild_tensor_v2", b"]", number(0), tup(), tup(), b"N"),
    "a class of its own": called(
        "torch._tensor._rebuild_from_type_v2", named("torch.Size"), named("torch.Tensor"), tup(tup()), b"}"
    ),
    "a class replaced": named("argparse.Namespace") + b")\x81}" + text("__class__") + b"Nsb",
    "slots replaced": named("argparse.Namespace") + b")\x81N}" + text("a") + b"Ns\x86b",
    "a method of a dictionary": called("collections.OrderedDict") + b"}" + text("__setitem__") + b"Nsb",
    "a number of NumPy from an object": called(
        "numpy.core.multiarray.scalar", called("numpy.dtype", text("O8")), b"]"
    ),
    "a dtype of a tensor": called("numpy.dtype", WIDE),
    "a dtype with attributes": called("numpy._core.multiarray.scalar", called("numpy.dtype", text("f8")) + b"}"
    + text("names") + b"Nsb"),
    "an array of NumPy": called("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), tup(number(1 << 36))),
    "a deep key": b"}" + b")" + b"\x85" * 100_000 + b"Ns",
    "a deep key in a dictionary of old": b"()" + b"\x85" * 100_000 + b"Nd",
    "a deep item of a set": b"\x8f(" + b")" + b"\x85" * 100_000 + b"\x90",
    "a deep frozen set": b"(" + b")" + b"\x85" * 100_000 + b"\x91",
    "items for a tensor": tensor() + text("a") + b"Ns",
    "items for text": text("a") + b"Na",
    "an extension": b"\x82\x01",
    "a class of old": b"(" + number(1 << 36) + b"i__builtin__\nbytearray\n",
    "an object of old": b"(" + named("builtins.bytearray") + number(1 << 36) + b"o",
    "keyword arguments": named("argparse.Namespace") + b")}\x92",
    "a storage called by text": b"Pstorage\n",
    "too long": text("A" * pickled.MAX_BYTES),
}  # fmt: skip


def zipped(pickle: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in {
            "data.pkl": pickle,
            "byteorder": b"little",
            "data/0": bytes(16),
            "version": b"3\n",
        }.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "as it once was"])
@pytest.mark.parametrize("asked", ASKED)
def test_nothing_is_asked_for_that_torch_save_does_not_write(asked: str, old: bool, tmp_path: Path) -> None:
    """A kilobyte that requests gigabytes, hours or another class is refused before torch sees it."""
    body = b"\x80\x02" + b"}" + text("cls_token") + ASKED[asked] + b"s."
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."  # a number, a version, the system
    path = tmp_path / "x.pth"
    path.write_bytes(start + body + b"\x80\x02]." if old else zipped(body))
    missing = "is there" in asked
    with pytest.raises(EOFError if missing else NotPlainError):
        check_calls(path, not old)
    said = complaint(CheckpointError, lambda: Backbone.from_pretrained(path))
    assert ("is a damaged file" if missing else "besides tensors") in said


def test_the_pickle_that_torch_reads_is_the_one_that_is_checked(tmp_path: Path) -> None:
    """A file may hold two archives, or two members of one name; readers differ in which they use."""
    bad, good = zipped(b"\x80\x02" + ASKED["a bytearray"] + b"."), zipped(b"\x80\x02}.")
    stream = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(stream, "w") as archive:
        for content in (b"\x80\x02" + ASKED["a bytearray"] + b".", b"\x80\x02}."):
            archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    for number, content in enumerate((bad + good, good + bad, stream.getvalue())):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content)
        try:
            check_calls(path, True)
        except Exception:
            continue
        with open(path, "rb") as file:
            assert b"bytearray" not in torch._C.PyTorchFileReader(file).get_record("data.pkl")


def test_memory_and_time_of_the_check(tmp_path: Path) -> None:
    """A memo of any length, and as many opcodes as fit."""
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(b"\x80\x02}r\xff\xff\xff\x7fj\xff\xff\xff\x7f0."))
    check_calls(path, True)
    path.write_bytes(zipped(b"\x80\x02]" + b"]0" * (pickled.MAX_BYTES // 2) + b"."))
    with pytest.raises(NotPlainError, match="more than 8 MiB"):
        check_calls(path, True)
