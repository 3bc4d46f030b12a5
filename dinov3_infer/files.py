"""Opening weights files: what they are, told by content, and their tensors one at a time, mapped where that works."""

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, MissingFileError

__all__ = ["Checkpoint", "TensorSource", "TensorsInMemory", "open_checkpoint", "read_index"]

WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_NAMES = (WEIGHTS, PICKLED, "open_clip_model.safetensors")

# as safetensors names them
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource(Protocol):
    """Named tensors of which only those asked for are read."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, *, copying: bool = False) -> Tensor:
        """A tensor, mapped where the file allows it.  `copying`: the caller copies it at once, so no page is kept."""
        ...


class TensorsInMemory:
    """A state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, *, copying: bool = False) -> Tensor:
        return self._tensors[name]


class SafetensorsFiles:
    """One safetensors file, or the shards of one model."""

    def __init__(self, paths: list[Path]) -> None:
        self._handles: dict[Path, Any] = {}
        self._path_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            try:
                self._handles[path] = handle = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118  (a handle is no mapping)
                    if name in self.shapes:
                        raise CheckpointError(
                            f"'{path}' and '{self._path_of[name]}' hold '{name}'; these shards do not belong together"
                        )
                    self._path_of[name] = path
                    view = handle.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = _DTYPES.get(view.get_dtype(), torch.float32)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"'{path}' is not a whole safetensors file ({error}); download it again"
                ) from None

    def read(self, name: str, *, copying: bool = False) -> Tensor:
        path = self._path_of[name]
        if not copying:
            return self._handles[path].get_tensor(name)  # type: ignore[no-any-return]
        with safe_open(path, framework="pt") as once:  # its pages go when the tensor goes
            return once.get_tensor(name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors, the path that they came from, and what lies beside them."""

    path: str
    tensors: TensorSource
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json
    processor: Mapping[str, Any] = field(default_factory=dict)  # preprocessor_config.json


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A directory (Hugging Face, timm), a shard index, a safetensors file or a file of torch.save.

    Raises: MissingFileError; CheckpointError for anything that is not a checkpoint, said by what it is instead.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise MissingFileError(f"no weights at '{path.absolute()}'; check the path, or give a name of list_models()")
    file = _file_in(path) if path.is_dir() else path
    beside: list[dict[str, Any]] = [{}, {}]
    if path.is_dir() or file.name in (*_NAMES, INDEX):  # a file of any other name may lie in any company
        paths = (file.parent / CONFIG, file.parent / PROCESSOR)
        beside = [_read_json(p) if p.is_file() else {} for p in paths]
    if file.name.endswith(".index.json"):
        return Checkpoint(str(path), _open_shards(file), *beside)
    kind = _kind_of(file)
    tensors: TensorSource = (
        SafetensorsFiles([file]) if kind == "safetensors" else _read_torch(file, mapped=kind == "zip")
    )
    return Checkpoint(str(path), tensors, *beside)


def _file_in(folder: Path) -> Path:
    for name in (INDEX, *_NAMES):
        if (folder / name).is_file():
            return folder / name
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"'{folder}' is a sharded training checkpoint; make one file of it with dcp_to_torch_save of "
            "torch.distributed.checkpoint.format_utils"
        )
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) != 1:
        listed = ", ".join(p.name for p in found[:4]) or "none"
        raise CheckpointError(
            f"'{folder}' should hold one weights file ({', '.join(SUFFIXES)}), found {listed}; give the file itself"
        )
    return found[0]


def read_index(index: Path) -> dict[str, str]:
    """Which shard holds which tensor; all shards lie in the folder of their index."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"'{index}' is no index of shards: it has no weight_map; download it again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(
                f"'{index}' names the shard '{name}', which lies outside its folder; this file is not to be trusted"
            )
    return weight_map


def _open_shards(index: Path) -> SafetensorsFiles:
    weight_map = read_index(index)
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(
                f"'{index}' names the shard '{path.name}', which is not there; download all {len(paths)} shards"
            )
    shards = SafetensorsFiles(paths)
    absent = [name for name in weight_map if name not in shards.shapes]
    if absent:
        raise CheckpointError(f"'{index}' lists '{absent[0]}', which no shard holds; download the shards again")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{path}' should hold a JSON object, holds a {type(content).__name__}; download it again"
        )
    return content


def _kind_of(file: Path) -> str:
    """Looks at the first bytes, since what a loader says of a wrong file is no help."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(file):
        return "zip"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "pickle"
    if len(head) > 9 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    text = head.decode("ascii", "replace").strip()
    if size == 0:
        what = "it is empty"
    elif text.startswith("version https://git-lfs"):
        what = "it is a Git LFS pointer, not the file that it points to"
    elif text.startswith("<"):
        what = f"it starts with {text[:5]!r}, as an error page does"
    elif head.startswith(b"PK") or (len(head) > 9 and head[8:9] == b"{"):
        what = "it is cut short"
    else:
        what = f"it starts with {head[:5]!r}"
    raise CheckpointError(f"'{file}' is not a checkpoint: {what} ({size:,} bytes); download it again")


def _read_torch(file: Path, mapped: bool) -> TensorsInMemory:
    """Every tensor of a file of torch.save under its dotted name, so that nested checkpoints look like flat ones."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # main_dino.py keeps its arguments, plain values
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"'{file}' holds Python objects besides tensors, which could run code when loaded; "
            "save its state dict alone, with torch.save(model.state_dict(), ...)"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"'{file}' is a damaged file of torch.save ({type(error).__name__}); download it again"
        ) from None
    tensors: dict[str, Tensor] = {}

    def flatten(value: Any, prefix: str, depth: int) -> None:
        if isinstance(value, Tensor):
            tensors[prefix] = value
        elif isinstance(value, Mapping) and depth < 8:
            for key, inner in value.items():
                flatten(inner, f"{prefix}.{key}" if prefix else str(key), depth + 1)

    flatten(content, "", 0)
    return TensorsInMemory(tensors)
