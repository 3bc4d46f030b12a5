"""Opens weights files: finds out their kind from the content, and reads their tensors one at a time."""

import argparse
import json
import os
import pickle
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, Dinov3Error, MissingFileError
from .layouts import LayoutName

__all__ = ["Checkpoint", "TensorSource", "TensorsInMemory", "holds_weights", "kind_of", "open_checkpoint", "read_index"]

WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_OF_RUN = "backbone"  # folder of the weights inside the folder of a training run
METADATA = "dinov3_infer"  # entry in the header of a safetensors file that replaces config.json
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_NAMES = (WEIGHTS, PICKLED, "open_clip_model.safetensors")
MAX_JSON = 2**22  # bytes of a config, an index or a header: fifty times those of the largest model

# floating point dtypes by their names in safetensors
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[
        str, torch.dtype | None
    ]  # None: integers, quantised, sparse, or fewer elements stored than the shape has

    def read(self, name: str, *, copying: bool = False) -> Tensor:
        """Read one tensor, of shape `shapes[name]`, memory-mapped if the file allows it.

        `copying`: the caller copies the tensor at once, so that no page of the file stays in memory.
        """
        ...


class TensorsInMemory:
    """A state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {n: t.dtype if t.dtype in _DTYPES.values() else None for n, t in tensors.items()}

    def read(self, name: str, *, copying: bool = False) -> Tensor:
        """The tensor, of shape `shapes[name]`; not a copy."""
        return self._tensors[name]


class SafetensorsFiles:
    """One safetensors file, or the shards of one model.

    Raises: CheckpointError if a file is damaged or two files hold the same tensor.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._handles: dict[Path, Any] = {}
        self._path_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}
        self.metadata = ""
        for path in paths:
            with open(path, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
            if length > MAX_JSON:
                raise CheckpointError(
                    f"'{path}' claims a header of {length:,} bytes, more than any model has; download it again"
                )
            try:
                self._handles[path] = handle = safe_open(path, framework="pt")
                self.metadata = (handle.metadata() or {}).get(METADATA, "")  # written by `save_pretrained`
                for name in handle.keys():  # noqa: SIM118  (a handle is no mapping)
                    if name in self.shapes:
                        raise CheckpointError(
                            f"'{path}' and '{self._path_of[name]}' hold '{name}', so these shards do not belong "
                            "together; download them again"
                        )
                    self._path_of[name] = path
                    view = handle.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = _DTYPES.get(view.get_dtype())
            except (SafetensorError, OSError, RuntimeError) as error:  # Runtime: cannot be mapped
                raise CheckpointError(f"'{path}' is a damaged safetensors file ({error}); download it again") from None

    def read(self, name: str, *, copying: bool = False) -> Tensor:
        """The tensor, of shape `shapes[name]`."""
        path = self._path_of[name]
        if not copying:
            return self._handles[path].get_tensor(name)  # type: ignore[no-any-return]
        with safe_open(path, framework="pt") as once:  # its pages are freed with the tensor
            return once.get_tensor(name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors, their path, and the configs beside them."""

    path: str
    tensors: TensorSource
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json
    processor: Mapping[str, Any] = field(default_factory=dict)  # preprocessor_config.json
    layout: LayoutName | None = None  # the layout, if known
    known: Mapping[str, Any] = field(default_factory=dict)  # fields of a ViTConfig that override config.json

    @property
    def repository(self) -> str:
        """The hub id of a checkpoint in the hub's cache; "" for others."""
        found = re.search(r"models--([^/]+?)--([^/]+)/snapshots(/|$)", Path(self.path).as_posix())
        return f"{found[1]}/{found[2]}" if found else ""


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder (Hugging Face, timm), a shard index, a safetensors file or a file of torch.save.

    Raises:
        MissingFileError: There is nothing at the path.
        CheckpointError: The file is no checkpoint; the message says what it is.
    """
    try:
        return _open(Path(path))
    except Dinov3Error:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}' ({error.strerror}); check it and its permissions") from None


def _open(path: Path) -> Checkpoint:
    path = Path(os.path.expanduser(path))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: an impossible file name
        raise MissingFileError(
            f"no weights at '{path.absolute()}'; check the path, or give a name of list_models()"
        ) from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise CheckpointError(f"'{path}' is a pipe or a device; give a file or a folder")
    file = _file_in(path) if stat.S_ISDIR(mode) else path
    described = file is not path or file.name in (
        *_NAMES,
        INDEX,
    )  # the configs beside a file of another name may belong to another model
    beside = (file.parent / CONFIG, file.parent / PROCESSOR)
    config, processor = (_read_json(p) if described and p.is_file() else {} for p in beside)
    tensors = _open_tensors(file)
    if not config and isinstance(tensors, SafetensorsFiles) and tensors.metadata:
        return Checkpoint(str(path), tensors, _parsed(tensors.metadata, f"the header of '{file}'"), processor)
    return Checkpoint(str(path), tensors, config, processor)


def holds_weights(path: Path) -> bool:
    """Whether a file or folder is meant as a checkpoint, even a damaged one; True if it cannot be read."""
    try:
        if path.is_dir():
            return any(p.name in (INDEX, ".metadata") or p.suffix in SUFFIXES for p in path.iterdir())
        _kind_of(path)
    except CheckpointError:
        return False
    except OSError:
        pass
    return True


def _open_tensors(file: Path) -> TensorSource:
    if file.name.endswith(".index.json"):
        return _open_shards(file)
    kind = _kind_of(file)
    return SafetensorsFiles([file]) if kind == "safetensors" else _read_torch(file, zipped=kind == "zip")


def _file_in(folder: Path) -> Path:
    for name in (INDEX, *_NAMES):
        if (folder / name).is_file():
            return folder / name
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"'{folder}' is a sharded training checkpoint; convert it to one file with dcp_to_torch_save of "
            "torch.distributed.checkpoint.format_utils"
        )
    if (folder / _OF_RUN).is_dir():
        return _file_in(folder / _OF_RUN)
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) != 1:
        listed = ", ".join(p.name for p in found[:4]) or "none"
        raise CheckpointError(
            f"'{folder}' should hold one weights file ({', '.join(SUFFIXES)}), found {listed}; give the file itself"
        )
    return found[0]


def read_index(index: Path) -> dict[str, str]:
    """Read an index: tensor name -> file name of its shard, in the folder of the index.

    Raises: CheckpointError if the index is malformed, or names a file of another folder or format.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise CheckpointError(f"'{index}' is no index of shards: it has no weight_map; download it again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"'{index}' names the shard '{name}' outside its folder; do not trust this file")
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"'{index}' names the shard '{name}', which is no safetensors file; save the model in that format"
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
    with open(path, "rb") as stream:
        text = stream.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise CheckpointError(
            f"'{path}' is longer than {MAX_JSON:,} bytes, too long for such a file; download it again"
        )
    return _parsed(text, f"'{path}'")


def _parsed(text: bytes | str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds a JSON {type(content).__name__}, no object; download it again")
    return content


def _kind_of(file: Path) -> str:
    """Look at the first bytes, since a loader's message about a wrong file does not help."""
    with open(file, "rb") as stream:
        return kind_of(stream.read(64), file.stat().st_size, str(file))


def kind_of(head: bytes, size: int, shown: str) -> str:
    """Kind of a file by its first 64 bytes: "safetensors", "zip" or "pickle".

    Raises: CheckpointError for other files; the message says what the file is.
    """
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if len(head) > 9 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"  # before pickles, since a header of 640 bytes begins like a pickle
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "pickle"
    text = head.decode("ascii", "replace").strip()
    others = (
        (size == 0, "it is empty"),
        (text.startswith("version https://git-lfs"), "it is a Git LFS pointer, not the file that it points to"),
        (text.startswith("<"), f"it starts with {text[:5]!r}, as an error page does"),
        (head.startswith(b"PK") or (len(head) > 9 and head[8:9] == b"{"), "it is cut short"),
        (True, f"it starts with {head[:5]!r}"),
    )
    what = next(words for fits, words in others if fits)
    raise CheckpointError(f"'{shown}' is not a checkpoint: {what} ({size:,} bytes); download it again")


class _Inert:
    """In place of a number of NumPy, such as the best score of a training run, which nothing here needs."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _read_torch(file: Path, zipped: bool) -> TensorsInMemory:
    """Read a file of torch.save; each tensor gets its dotted name, so that nested checkpoints look like flat ones."""
    from .pickled import NUMPY, NotPlainError, check_calls  # here, because most checkpoints are safetensors

    # torch looks a global of a file up by the module and the name of what it may call
    places = [("numpy", "dtype"), *((module, "scalar") for module in NUMPY)]
    numbers = [type(name, (_Inert,), {"__module__": module}) for module, name in places]
    try:
        check_calls(file, zipped)
        with torch.serialization.safe_globals([argparse.Namespace, *numbers]):  # main_dino.py stores its arguments
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        named = f" ({error})" if isinstance(error, NotPlainError) else ""
        raise CheckpointError(
            f"'{file}' holds Python objects besides tensors{named}, which could run code or use up memory "
            "when loaded; save only its state dict, with torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # torch raises any exception for damaged files
        raise CheckpointError(
            f"'{file}' is a damaged file of torch.save ({type(error).__name__}); download it again"
        ) from None
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()  # a dictionary may contain itself

    def flatten(value: Any, prefix: str, depth: int) -> None:
        if isinstance(value, Tensor):
            tensors[prefix] = torch.detach(value)  # drops attributes set by the file
        elif isinstance(value, dict) and id(value) not in seen and depth < 8:
            seen.add(id(value))
            for key, inner in dict.items(value):
                if isinstance(key, str):
                    flatten(inner, f"{prefix}.{key}" if prefix else key, depth + 1)

    flatten(content, "", 0)
    found = TensorsInMemory(tensors)
    found.dtypes |= {name: None for name, tensor in tensors.items() if not _is_stored(tensor)}
    return found


def _is_stored(tensor: Tensor) -> bool:
    """Whether every element is in memory: not sparse, not on "meta", not repeated by a stride of 0."""
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
