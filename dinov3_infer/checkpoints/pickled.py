"""Examines a file of torch.save before torch runs any call in it.

With weights_only=True torch runs no code of the file, but it calls a few functions with arguments from the file, and a
kilobyte of such calls can allocate all memory.  This module unpickles the file with stand-ins for these functions,
which allocate nothing and accept only the arguments that torch.save writes.  All other calls are refused.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

__all__ = ["NUMPY", "NotPlainError", "check_calls"]

MAX_BYTES = 2**23  # size limit of a pickle, which names tensors but does not hold them
NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # where NumPy 1 and 2 have their numbers
_LARGE = f"more than {MAX_BYTES >> 20} MiB of them"
_SAVED_BEFORE = 5  # pickles in a file of before 2020: magic number, version, system, object, keys
_KEY_DEPTH = 3  # nesting of tuples in keys, which Python hashes recursively


class NotPlainError(pickle.UnpicklingError):
    """The file holds an object that is neither a tensor nor a plain value; the message names it."""


def check_calls(file: Path, zipped: bool) -> None:
    """Check that loading `file` would make only the calls of torch.save.

    torch.save compresses nothing, so compressed members, which may unpack to a thousand times their size, are refused.

    Raises: NotPlainError; for damaged files any exception of pickle.
    """
    size = file.stat().st_size
    if not zipped:
        with open(file, "rb") as stream:
            bounded = _Bounded(stream)
            for _ in range(_SAVED_BEFORE):
                _Reader(bounded, size).load()
        return
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise NotPlainError("a compressed member")
            if member.filename.endswith(".pkl") and member.file_size > MAX_BYTES:
                raise NotPlainError(_LARGE)
    with open(file, "rb") as stream:  # torch's own reader, since two zip readers may see two archives in one file
        content = torch._C.PyTorchFileReader(stream).get_record("data.pkl")
    if len(content) > MAX_BYTES:
        raise NotPlainError(_LARGE)
    _Reader(_Bounded(io.BytesIO(content)), size).load()


class _Bounded:
    """A stream that reads at most MAX_BYTES in total, and never allocates more."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.left = stream, MAX_BYTES

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise NotPlainError(_LARGE)
        return self._taken(self.stream.read(size))

    def readline(self) -> bytes:
        return self._taken(self.stream.readline(self.left))

    def _taken(self, found: bytes) -> bytes:
        self.left -= len(found)
        return found


class _Name:
    """An object that a file refers to by name: a dtype, a class of storages.  It cannot be called."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def __call__(self, *arguments: object) -> None:
        raise NotPlainError(self.name)


class _Storage:
    def __init__(self, count: int) -> None:
        self.count = count  # elements


class _Tensor:
    def __init__(self, stored: bool) -> None:
        self.stored = stored  # whether each element has its own number in the storage


class _Dict(dict[Any, Any]):
    """An OrderedDict."""


class _Namespace:
    """An argparse.Namespace, in which main_dino.py keeps its arguments as plain values."""

    def __new__(cls, *arguments: object) -> "_Namespace":
        _want(not arguments, "argparse.Namespace")
        return super().__new__(cls)


class _Dtype:
    """A dtype of NumPy."""


def _want(right: bool, what: str) -> None:
    if not right:
        raise NotPlainError(what)


def _is_sizes(value: object) -> bool:
    return type(value) is tuple and all(type(side) is int for side in value)


def _is_key(value: object, depth: int = _KEY_DEPTH) -> bool:
    """Whether hashing the value is cheap."""
    if type(value) is tuple:
        return depth > 0 and len(value) < 100 and all(_is_key(one, depth - 1) for one in value)
    return value is None or type(value) in (str, int, float, bool, bytes, complex, _Name)


def _tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> _Tensor:
    right = isinstance(storage, _Storage) and type(offset) is int and _is_sizes(size) and _is_sizes(stride)
    _want(right and len(rest) <= 4, "a tensor of something else")
    assert isinstance(storage, _Storage) and isinstance(size, tuple)
    return _Tensor(math.prod(size) <= storage.count)


def _quantised(storage: object, offset: object, size: object, stride: object, *rest: object) -> _Tensor:
    found = _tensor(storage, offset, size, stride, *rest)
    _want(found.stored, "a stretched tensor")  # torch allocates its full size
    return found


def _sparse(layout: object, data: object) -> _Tensor:
    _want(type(layout) is _Name and type(data) is tuple, "a sparse tensor of something else")
    assert isinstance(data, tuple)
    # torch visits every index
    _want(all(one.stored for one in data if isinstance(one, _Tensor)), "a stretched tensor")
    _want(all(isinstance(one, (_Tensor, _Name, bool)) or _is_sizes(one) for one in data), "a sparse tensor")
    return _Tensor(False)


def _nowhere(dtype: object, size: object, stride: object, requires_grad: object) -> _Tensor:
    _want(_is_sizes(size) and _is_sizes(stride), "a tensor of something else")
    return _Tensor(False)


def _parameter(data: object, *rest: object) -> _Tensor:
    _want(isinstance(data, _Tensor) and len(rest) <= 3, "a parameter of something else")
    assert isinstance(data, _Tensor)
    return data


def _with_attributes(make: object, kind: object, arguments: object, state: object) -> _Tensor:
    known = make in (_tensor, _quantised, _sparse, _nowhere, _parameter)
    _want(known and type(kind) is _Name and type(arguments) is tuple, "a tensor of another class")
    assert callable(make) and isinstance(arguments, tuple)
    found = make(*arguments)
    assert isinstance(found, _Tensor)
    return found


def _named(*arguments: object) -> _Name:
    """A device or a layout."""
    _want(all(type(one) in (str, int) for one in arguments), "a device of something else")
    return _Name()


def _dtype(*arguments: object) -> _Dtype:
    _want(all(type(one) in (str, int, bool) for one in arguments), "a dtype of something else")
    return _Dtype()


def _scalar(*arguments: object) -> None:
    _want([type(one) for one in arguments] == [_Dtype, bytes], "a number of something else")


def _empty(*arguments: object) -> _Dict:
    _want(not arguments, "an OrderedDict of something else")
    return _Dict()


_CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _nowhere,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.serialization._get_layout": _named,
    "torch.device": _named,
    "collections.OrderedDict": _empty,
    "argparse.Namespace": _Namespace,
    "numpy.dtype": _dtype,
    **{f"{module}.scalar": _scalar for module in NUMPY},
}


class _Reader(pickle._Unpickler):
    """Unpickles with the stand-ins.  The C unpickler would allocate a memo of any requested length."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch}  # by opcode

    def __init__(self, stream: _Bounded, size: int) -> None:
        super().__init__(stream)
        self.size = size  # bytes of the whole file
        self.copied = 0  # characters and items passed to calls
        self.storages, self.stored = dict[str, _Storage](), 0  # by key; elements in all of them
        self.calls = _CALLS | {
            "_codecs.encode": self._encoded,
            "builtins.set": self._set,
            "builtins.complex": self._complex,
            "torch.Size": self._sides,
            "collections.Counter": self._counter,
        }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global of the file.  Raises: NotPlainError for globals that torch.save does not write."""
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in self.calls:
            return self.calls[full]
        kinds = (torch.dtype, torch.layout, torch.qscheme)
        plain = module == "torch" and (name == "Tensor" or isinstance(getattr(torch, name, None), kinds))
        if plain or full == "torch.nn.parameter.Parameter":
            return _Name(full)
        if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
            return _Name(full)
        raise NotPlainError(full)

    def persistent_load(self, pid: Any) -> _Storage:
        """The stand-in for a storage.

        Raises: NotPlainError for a malformed id, EOFError if the storages claim more than the file holds.
        """
        right = type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage" and type(pid[1]) is _Name
        _want(right and type(pid[2]) is str and type(pid[4]) is int, "a storage of something else")
        if pid[2] not in self.storages:
            self.storages[pid[2]] = _Storage(pid[4])
            self.stored += pid[4]
        _want(pid[4] >= 0, "a storage of something else")
        if self.stored > self.size:  # truncated, or a false claim
            raise EOFError
        return self.storages[pid[2]]

    # calls that copy their argument: all arguments together may not exceed the size of the file
    def _copied(self, count: int) -> None:
        self.copied += count
        _want(self.copied <= self.size, "more than the file holds")

    def _encoded(self, text: object, encoding: object) -> bytes:  # bytes in pickle protocol 2
        _want(type(text) is str and encoding == "latin1", "_codecs.encode")
        assert isinstance(text, str)
        self._copied(len(text))
        return text.encode("latin1")

    def _set(self, items: object) -> set[Any]:
        _want(type(items) is list and all(map(_is_key, items)), "a set of something else")
        assert isinstance(items, list)
        self._copied(len(items))
        return set(items)

    def _counter(self, counts: object) -> dict[Any, Any]:
        _want(type(counts) is dict, "a Counter of something else")
        assert isinstance(counts, dict)
        self._copied(len(counts))
        return dict(counts)

    def _sides(self, value: object) -> tuple[int, ...]:
        _want(_is_sizes(value), "a size of something else")
        assert isinstance(value, tuple)
        self._copied(len(value))
        return value

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is _Dtype:
            return _want(type(state) is tuple, "attributes of a dtype")
        right = type(state) is dict and all(type(key) is str and not key.startswith("__") for key in state)
        _want(right and type(made) in (_Dict, _Namespace), f"attributes of a {type(made).__name__.lstrip('_')}")
        self._copied(len(state))

    def _complex(self, *parts: object) -> complex:
        _want(len(parts) == 2 and all(type(part) is float for part in parts), "a complex number of something else")
        return 0j

    # opcodes that hash keys or allocate before they read
    def _put(self, items: list[Any], into: Any) -> None:
        _want(isinstance(into, dict), f"items of a {type(into).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _want(_is_key(key), "a key of something else")
            into[key] = value

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value], self.stack[-1])

    def _setitems(self) -> None:
        items = self.pop_mark()
        self._put(items, self.stack[-1])

    def _dict(self) -> None:
        items, made = self.pop_mark(), dict[Any, Any]()
        self._put(items, made)
        self.append(made)

    def _append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        into = self.stack[-1]
        _want(type(into) is list, f"items of a {type(into).__name__}")
        into.extend(items)

    def _additems(self) -> None:
        items, into = self.pop_mark(), self.stack[-1]
        _want(type(into) is set and all(map(_is_key, items)), "a set of something else")
        into.update(items)

    def _refused(self) -> None:
        raise NotPlainError("bytearray")

    dispatch |= {
        pickle.BUILD[0]: _build, pickle.SETITEM[0]: _setitem, pickle.SETITEMS[0]: _setitems, pickle.DICT[0]: _dict,
        pickle.APPEND[0]: _append, pickle.APPENDS[0]: _appends, pickle.ADDITEMS[0]: _additems,
    } | dict.fromkeys(
        (op[0] for op in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.FROZENSET,
                          pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX)),
        _refused,
    )  # fmt: skip
