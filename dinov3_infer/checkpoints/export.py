"""Files for other engines: .onnx for ONNX Runtime, OpenVINO and TensorRT, .pt2 for torch without this package.

A file gets its name after it has run in its own engine and agreed with the model.
"""

import json
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, MissingFileError, PrecisionError, UnsupportedError
from ..images.preprocess import Preprocess
from ..model.network import Network
from ..version import __version__
from ..zoo import ModelInfo
from .export_graph import INPUT, Dynamic, Tokens, export_copy, graph_of, program

__all__ = ["Dynamic", "export_model", "worst_token"]

log = logging.getLogger("dinov3_infer")

OPSETS = range(18, 24)  # older opsets lack these forms of Split and Pad; 23 has attention as one operator
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # see `worst_token`
_ONE_FILE = 1 << 30  # bytes of weights in one file; a protobuf holds at most 2 GiB

Engine = Callable[[Tensor], Tokens]


def export_model(
    model: Network,
    path: str | os.PathLike[str],
    preprocess: Preprocess,
    info: ModelInfo | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    dynamic: Dynamic = "batch",
    opset: int = 18,
) -> Path:
    """Write a model for another engine, see `Backbone.export`.

    Args:
        path: A file that ends in .onnx or .pt2.
        preprocess: The transform, written into the metadata of the file.
        info: The model of the zoo, for the metadata.
        size: Side in pixels, or (height, width) (default: that of `preprocess`).
        dynamic: "batch" for any batch size, True for any height and width too, False for one image of one size.
        opset: ONNX opset, 18 to 23.

    Returns: The path.  The graph takes `pixel_values` [B, 3, H_px, W_px], and gives `cls_token` [B, C],
    `register_tokens` [B, R, C] (if R > 0) and `patch_tokens` [B, P, C].

    Raises:
        InputError: The suffix, size or `dynamic` is wrong.
        MissingFileError: The folder does not exist.
        UnsupportedError: A package is missing, or the engine has no such opset or dtype.
        PrecisionError: The file does not compute what the model computes.

    Example:
        >>> export_model(bb, "vits16.onnx", bb.preprocess, bb.info, size=224)
    """
    target = Path(path).expanduser()
    kind = _FORMATS.get(target.suffix)
    if kind is None:
        raise InputError(f"'{target}' should end in {' or '.join(_FORMATS)}; rename it")
    if not target.parent.is_dir():
        raise MissingFileError(f"no folder '{target.parent.absolute()}' to write '{target.name}' to; make it first")
    if dynamic not in (True, False, "batch"):
        raise InputError(f"dynamic is 'batch', True (any height and width too) or False; got {dynamic!r}")
    if opset not in OPSETS:
        raise UnsupportedError(f"opset {opset} cannot be written; give {OPSETS[0]} to {OPSETS[-1]}, or leave it out")
    for needed in kind.needs:
        if find_spec(needed) is None:
            raise UnsupportedError(
                f"writing and checking '{target.suffix}' needs {needed}, which is not installed; "
                "pip install 'dinov3-infer[onnx]'"
            )
    dtype = model.main_weight.dtype
    if dtype not in kind.dtypes:
        raise UnsupportedError(
            f"a model in {dtype} cannot be checked as '{target.suffix}'; load it with dtype=torch.float32, and let the "
            "engine choose its precision"
        )
    grid = _grid(model, preprocess.size if size is None else size)
    host = export_copy(model)
    graph = graph_of(export_copy(host), None if dynamic is True else grid)
    beside = target.with_name(f".{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        with _quiet():
            kind.write(program(graph, grid, dynamic), beside, _facts(host, preprocess, info), opset)
            distance = _distance(host, kind.open(beside), _inputs(host, grid, dynamic))
        if not distance <= LIMITS[dtype]:
            failed = target.with_name(f"{target.name}.failed")
            _move(beside, failed)
            raise PrecisionError(
                f"the file does not compute what the model computes: a token is off by {distance:.1e} of its length, "
                f"and {LIMITS[dtype]:.0e} is allowed; the file is kept as '{failed}', please report it"
            )
        _move(beside, target)
    finally:
        for left in (beside, Path(f"{beside}.data")):
            left.unlink(missing_ok=True)
    log.info("wrote '%s'; its tokens are within %.1e of the model's", target, distance)
    return target


def _grid(model: Network, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) in patches.  Raises InputError if the size is not whole patches."""
    patch = model.patch_size
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise InputError(f"size is the side of a square or (height, width) in pixels, got {size!r}")
    if any(side % patch for side in sides):
        nearest = "x".join(str(max(1, round(side / patch)) * patch) for side in sides)
        raise InputError(
            f"size {sides[0]}x{sides[1]} is not a multiple of the patch size {patch}; the nearest is {nearest}"
        )
    return sides[0] // patch, sides[1] // patch


def _facts(model: Network, preprocess: Preprocess, info: ModelInfo | None) -> dict[str, str]:
    """Metadata for whoever finds the file."""
    found: dict[str, Any] = dict(dinov3_infer=__version__, patch_size=model.patch_size)
    found |= dict(mean=list(preprocess.mean), std=list(preprocess.std), preprocess=asdict(preprocess))
    if info is not None:
        found |= dict(architecture=info.name, weights=info.title, licence_of_the_weights=info.licence)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


class _Format(NamedTuple):
    write: Callable[[Any, Path, dict[str, str], int], None]
    open: Callable[[Path], Engine]
    needs: tuple[str, ...]  # modules
    dtypes: tuple[torch.dtype, ...]  # supported by the engine on this machine


def _write_onnx(program: Any, path: Path, facts: dict[str, str], opset: int) -> None:
    import onnx

    names = [name for name in _AXES if name != INPUT]
    if len(program.graph_signature.output_specs) < len(names):
        names.remove("register_tokens")
    large = sum(t.nbytes for t in program.state_dict.values()) > _ONE_FILE
    written = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=opset, input_names=[INPUT], output_names=names
    )
    written.save(path, external_data=large)  # type: ignore[union-attr]
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    unwanted = {node.op_type for node in graph.node if node.domain or node.op_type in ("If", "Loop", "Scan")}
    found = model.opset_import[0].version
    if unwanted or model.functions or found != opset:
        raise UnsupportedError(
            f"torch {torch.__version__} wrote operators that engines refuse for opset {opset} "
            f"({', '.join(sorted(unwanted)) or f'opset {found}'}); use another opset, or another version of torch or "
            "onnxscript"
        )
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]  # source locations
    del graph.value_info[:], model.metadata_props[:]
    for place, axes in ((graph.input[0], _AXES[INPUT]), *((o, _AXES[o.name]) for o in graph.output)):
        for dimension, name in zip(place.type.tensor_type.shape.dim, axes, strict=True):
            if dimension.dim_param:
                dimension.dim_param = name
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version = "dinov3_infer", __version__
    onnx.save(model, path)


_AXES = {  # outputs in the order of `Graph`
    INPUT: ("batch", "channels", "height", "width"),
    "cls_token": ("batch", "width"),
    "register_tokens": ("batch", "registers", "width"),
    "patch_tokens": ("batch", "patches", "width"),
}


def _open_onnx(path: Path) -> Engine:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Tensor) -> Tokens:
        found = session.run(names, {INPUT: pixels.numpy()})
        return {name: torch.from_numpy(tokens) for name, tokens in zip(names, found, strict=True)}

    return run


def _write_program(program: Any, path: Path, facts: dict[str, str], opset: int) -> None:
    torch.export.save(program, path, extra_files={"dinov3_infer.json": json.dumps(facts)})


def _open_program(path: Path) -> Engine:
    found: Engine = torch.export.load(path).module()
    return found


_FORMATS = {
    ".onnx": _Format(
        _write_onnx, _open_onnx, ("onnx", "onnxscript", "onnxruntime"), (torch.float32, torch.float64, torch.float16)
    ),
    ".pt2": _Format(_write_program, _open_program, (), tuple(LIMITS)),
}


def _move(source: Path, target: Path) -> None:
    """Rename a file together with its external weights, whose name it holds."""
    data = Path(f"{source}.data")
    if data.exists():
        import onnx

        model = onnx.load(source, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{target.name}.data"
        onnx.save(model, source)
        os.replace(data, f"{target}.data")
    os.replace(source, target)


def worst_token(ours: Tensor, theirs: Tensor) -> float:
    """Largest distance between two sets of tokens [..., C], relative to the length of each token of `theirs`.

    Returns infinity if the shapes differ or a value is not finite.
    """
    if ours.shape != theirs.shape or not bool((ours.isfinite() & theirs.isfinite()).all()):
        return float("inf")
    theirs = theirs.double()
    lengths = theirs.norm(dim=-1).clamp_min(1e-30)  # avoids 0/0
    return float(((ours.double() - theirs).norm(dim=-1) / lengths).max()) if theirs.numel() else 0.0


def _inputs(model: Network, grid: tuple[int, int], dynamic: Dynamic) -> Iterator[Tensor]:
    """Noise [B, 3, H_px, W_px] of several sizes and batch sizes, as far as `dynamic` frees them."""
    grids, own, draw = [grid], getattr(model.config, "position_grid", None), torch.Generator().manual_seed(0)
    if dynamic is True:
        h, w = (max(2, n) for n in grid)
        grids = [(h, w), (w + 1, h), (max(2, h // 2), w + 2), *([(own, own)] if own else [])]
    elif dynamic:
        grids *= 2
    for i, sides in enumerate(grids):
        shape = (1 + i % 2, getattr(model.config, "in_chans", 3), *(side * model.patch_size for side in sides))
        yield torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")


@torch.no_grad()
def _distance(model: Network, engine: Engine, inputs: Iterator[Tensor]) -> float:
    found = 0.0
    for pixels in inputs:
        ours, tokens = model(pixels, layers=[]), engine(pixels)
        found = max(found, *(worst_token(t, getattr(ours, name)) for name, t in tokens.items()))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' logs and warnings; errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
