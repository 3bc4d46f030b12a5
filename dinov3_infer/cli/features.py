"""`dinov3-infer features`: writes dense feature maps, one file per image."""

import argparse
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..backbone import Backbone
from ..errors import Dinov3Error, InputError, PrecisionError
from ..features.result import Features
from ..images.opening import find_images
from ..images.sources import relative_names
from ..model.network import resolve_layers
from ..system import whole
from .inputs import check_folder, load_backbone, results, status
from .main import tell

__all__ = ["run"]

Arrays = dict[str, np.ndarray[Any, Any]]
INDEX = "index.jsonl"


def run(args: argparse.Namespace) -> int:
    """Writes the maps and their index; returns the exit status.

    Raises:
        InputError: two images would have the same output file, or the layers do not fit into one array.
        Dinov3Error: an image cannot be read, with --on-error raise.
    """
    images = find_images(args.sources)
    paths = [images.key(i) or images.label(i) for i in range(len(images))]
    names = [f"{name}.{args.format}" for name in relative_names(images)]
    _check_names(paths, names)
    folder = check_folder(args.out, args.overwrite)
    bb = load_backbone(args)
    blocks = resolve_layers(args.layers, bb.n_blocks)
    if args.format == "npy" and len({bb.stride(block) for block in blocks}) > 1:
        raise InputError(
            "these layers have maps of several sizes, which do not fit into one .npy array; use --format safetensors"
        )
    stream = results(bb, images, args, args.layers)
    folder.mkdir(exist_ok=True)
    skipped = done = 0
    beside = folder / f".{INDEX}.{uuid.uuid4().hex[:8]}"
    try:
        with open(beside, "w", encoding="utf-8") as index:
            for name, path, found in zip(names, paths, stream, strict=True):
                line: dict[str, str | None] = dict(file=name, path=path, error="")
                if not isinstance(found, Dinov3Error):
                    _write(folder / name, _maps(found, blocks, args.half), _facts(bb, found, path))
                elif args.on_error == "raise":
                    raise found
                else:
                    skipped += 1
                    line |= dict(file=None, error=str(found))
                index.write(json.dumps(line) + "\n")
                done += 1
    finally:  # after an interruption too, the index lists the finished files
        if done:
            os.replace(beside, folder / INDEX)
        beside.unlink(missing_ok=True)
    left_out = f"; {skipped} could not be read, see '{folder / INDEX}'" if skipped else ""
    count = done - skipped
    tell(f"wrote maps of {count} {'image' if count == 1 else 'images'} to '{folder}'{left_out}")
    return status(done, skipped)


def _check_names(paths: list[str], names: list[str]) -> None:
    """Raises InputError if two images have the same output file."""
    first: dict[str, int] = {}
    for i, (path, name) in enumerate(zip(paths, names, strict=True)):
        other = first.setdefault(os.path.normcase(name), i)
        if other != i and paths[other] == path:
            raise InputError(f"'{path}' is given twice; give it once")
        if other != i:
            raise InputError(
                f"'{paths[other]}' and '{path}' would both be written to '{name}'; use one command and one folder for "
                "each"
            )


def _maps(features: Features, blocks: list[int], half: bool) -> Arrays:
    """Arrays by name: `feature_map` [C, h, w], or `layer_N` for each requested block; `cls_token`; `valid` [h, w]."""
    tensors = {f"layer_{block}": layer.feature_map for block, layer in zip(blocks, features.layers, strict=True)}
    tensors = tensors or {"feature_map": features.feature_map}
    tensors["cls_token"] = features.cls_token
    if half:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise PrecisionError("features exceed the range of float16; remove --half")
    if features.valid is not None:
        tensors["valid"] = features.valid
    return {name: np.ascontiguousarray(tensor[0].numpy()) for name, tensor in tensors.items()}


def _facts(bb: Backbone, features: Features, path: str) -> dict[str, str]:
    """The metadata of a .safetensors file."""
    sizes = dict(original_size=features.original_sizes[0], input_size=features.input_size)
    shown = {name: f"{height}x{width}" for name, (height, width) in sizes.items()}
    path = path.encode("utf-8", "backslashreplace").decode()
    return {"model": bb.info.name if bb.info else "", "patch_size": str(bb.patch_size), "path": path, **shown}


def _write(target: Path, maps: Arrays, facts: dict[str, str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as path:
        if target.suffix == ".npy":  # [C, h, w], or [layers, C, h, w]
            found = [array for name, array in maps.items() if name.startswith(("feature_map", "layer_"))]
            np.save(path, found[0] if "feature_map" in maps else np.stack(found))
        else:
            path.write_bytes(save(maps, facts))
