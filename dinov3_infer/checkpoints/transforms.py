"""The transform for a checkpoint's images: stated by its files, else the default of its model.

A processor of transformers or a pretrained_cfg of timm that equals the published one of a named model changes nothing.
Any other statement beside the weights becomes the default.
"""

import logging
import math
import reprlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..errors import CheckpointError, InputError, UnsupportedError
from ..images.preprocess import Preprocess
from ..zoo import CORRECTIONS, MODELS, Config, ModelInfo, Style, preprocess_of
from .architecture import rows_like
from .config_json import hf_processor_config
from .reading import CONFIG, PROCESSOR, Checkpoint

__all__ = ["shown", "stated_transform", "transform_of"]

log = logging.getLogger("dinov3_infer")

_PLAIN: dict[str, Any] = dict(fit="squash", filter="bilinear", engine="pil", resize_to=None, crop_rounds="even")
_GEOMETRY = ("size", "fit", "filter", "engine", "resize_to", "crop_rounds")
_LEVELS = 255  # largest value of an 8-bit image, by which transforms divide
_FILTERS: dict[Any, str] = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}

Stated = dict[str, Any]  # fields of a Preprocess


def transform_of(config: Config, info: ModelInfo | None, style: Style | None = None) -> Preprocess:
    """The default transform of a network.

    It is that of the model `info`, else of the first model with this architecture.  For unknown architectures it has
    ImageNet's mean and std, at the size of the learned positions, or 16 patches a side (ConvNeXt: 8) without them.

    Raises: InputError if `style` is given for an unknown architecture.
    """
    row = info or next(iter(rows_like(config)), None)
    if row is not None:
        return preprocess_of(row, style)
    if style is not None:
        raise InputError(
            f"preprocessing={style!r} needs a known architecture, or a file beside the weights that states it; this "
            "model has neither, so leave preprocessing out"
        )
    first = next(iter(MODELS.values()))
    mean: tuple[float, ...] = first.mean
    std: tuple[float, ...] = first.std
    patches = config.position_grid or (16 if config.patch_size <= 16 else 8)
    if config.in_chans != 3:  # nothing states the channels: use the mean over the colours
        mean, std = ((round(sum(values) / 3, 3),) * config.in_chans for values in (mean, std))
    return Preprocess(mean, std, config.patch_size, size=patches * config.patch_size)


def shown(preprocess: Preprocess) -> str:
    """The transform as a text, without mean and std."""
    size = (
        preprocess.size
        if isinstance(preprocess.size, int) or preprocess.size is None
        else "x".join(str(side) for side in preprocess.size)
    )
    whole = f" of {preprocess.resize_to}" if preprocess.resize_to else ""
    return f"{preprocess.fit} {size or 'own size'}{whole} px, {preprocess.filter}, {preprocess.engine}"


def stated_transform(
    checkpoint: Checkpoint, config: Config, info: ModelInfo | None, style: Style | None, block: Mapping[str, Any]
) -> tuple[Preprocess, dict[str, str]]:
    """The transform of a checkpoint, and the sources of its geometry and of its mean and std.

    `block` is the block that `save_pretrained` wrote into config.json.

    Raises:
        CheckpointError: A file has wrong numbers.
        UnsupportedError: `style` asks for a transform that is not supported.
    """
    hf, timm = checkpoint.processor, checkpoint.config.get("pretrained_cfg")
    readers = {"hf": (PROCESSOR, hf, _of_processor), "timm": (CONFIG, timm, _of_timm)}
    found: tuple[str, Stated] | None = None
    for name, (file, content, read) in readers.items():
        if not isinstance(content, Mapping) or not content or style not in (None, name):
            continue
        try:
            found = (file, read(content))
            break
        except UnsupportedError as error:
            if style is not None:
                raise UnsupportedError(f"{file} of '{checkpoint.path}' {error}; leave preprocessing out") from None
            log.warning("%s of '%s' %s; using the default instead", file, checkpoint.path, error)
            found = (file, _levels_alone(content) if name == "hf" else _statistics(content))
            break
    file, stated = found or (CONFIG, {})
    stated = _statistics(checkpoint.config) | stated
    correction = CORRECTIONS.get(checkpoint.repository) if style is None else None
    if correction is not None:
        stated |= {"mean": correction[0], "std": correction[1]}
    if len(stated.get("mean", ())) == 1:  # one value for all channels
        stated |= {name: stated[name] * config.in_chans for name in ("mean", "std")}
    elif len(stated.get("mean", ())) == 3 != config.in_chans:  # timm and transformers keep the values of RGB
        stated = {name: value for name, value in stated.items() if name not in ("mean", "std")}
    has_geometry = "size" in stated
    if style is None and isinstance(saved := block.get("preprocess"), Mapping):
        ours = _build(lambda: _of_block(saved, config), CONFIG, checkpoint)
        if not hf or dict(hf) == hf_processor_config(config, ours, info):  # not edited since
            return ours, {"transform": f"dinov3_infer in {CONFIG}", "mean and std": f"dinov3_infer in {CONFIG}"}
    row = info or next(iter(rows_like(config)), None)
    by_row = (
        has_geometry and row is not None and _is_published(stated, config, row, "hf" if file == PROCESSOR else "timm")
    )
    base = transform_of(config, info, None if has_geometry else style)
    if by_row and style is None:
        stated = {name: value for name, value in stated.items() if name not in _GEOMETRY}
        has_geometry = False
    size, where = checkpoint.config.get("image_size"), _of_nobody(config, row)
    if row is None and not has_geometry and config.position_grid is None and _is_side(size, config):
        base, where = replace(base, size=size), "image_size in config.json, and our defaults"
    changes = (_PLAIN if has_geometry else {}) | stated
    made = _build(lambda: replace(base, **changes), file, checkpoint)
    if made.channels != config.in_chans:
        raise CheckpointError(
            f"{file} of '{checkpoint.path}' gives mean and std for {made.channels} channels, but the patches have "
            f"{config.in_chans}; correct that file"
        )
    if by_row:
        where = f"our own for {row.name}, whose published one {file} states"  # type: ignore[union-attr]
    elif info is not None:
        where = info.name
    unsaid = _of_nobody(config, row) if row is not None else "the default, ImageNet's"
    levels = file if "mean" in stated else info.name if info is not None else unsaid
    return made, {
        "transform": file if has_geometry else where if style is None or row is None else f"{style}'s of {row.name}",
        "mean and std": levels if correction is None else f"a correction of {CONFIG}: {correction[2]}",
    }


def _of_nobody(config: Config, row: ModelInfo | None) -> str:
    """The source of a geometry that neither a file nor a name states."""
    if row is not None:
        return f"the default of models of this shape, {row.name}"
    grid = (
        "a model without learned positions" if config.position_grid is None else "a table of positions, at its own size"
    )
    return f"the default for {grid}"


def _is_side(size: Any, config: Config) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**14 and size % config.patch_size == 0


def _is_published(stated: Stated, config: Config, info: ModelInfo, style: Style) -> bool:
    """Whether this is the geometry that the model's own repositories state."""
    if style == "hf":
        published = _of_processor(hf_processor_config(config, preprocess_of(info), info))
    else:
        try:
            published = vars(preprocess_of(info, style))
        except InputError:
            return False
    return all((_PLAIN | published)[name] == (_PLAIN | stated)[name] for name in _GEOMETRY)


def _build(make: Any, file: str, checkpoint: Checkpoint) -> Preprocess:
    try:
        return make()  # type: ignore[no-any-return]
    except (InputError, TypeError) as error:
        raise CheckpointError(f"{file} of '{checkpoint.path}' is wrong: {error}; correct that file") from None


def _of_block(saved: Mapping[str, Any], config: Config) -> Preprocess:
    """The transform that `save_pretrained` wrote."""
    names = {field.name for field in fields(Preprocess)}
    values: Stated = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items() if n in names}
    return Preprocess(**(values | {"patch_size": config.patch_size}))


def _statistics(source: Mapping[str, Any]) -> Stated:
    """Mean and std, under the names of transformers or timm."""
    mean, std = source.get("image_mean", source.get("mean")), source.get("image_std", source.get("std"))
    if isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) == len(std) > 0:
        return {"mean": tuple(mean), "std": tuple(std)}
    return {}


def _of_processor(stated: Mapping[str, Any]) -> Stated:
    """The fields of transformers' image processor.  Raises UnsupportedError for a transform that is not supported."""
    found: Stated = _levels(stated)
    kind = str(stated.get("image_processor_type", stated.get("feature_extractor_type", "")))
    if "size" not in stated and "crop_size" not in stated:
        return found
    for name in ("do_pad", "do_thumbnail", "do_align_long_axis", "do_reduce_labels", "do_flip_channel_order"):
        if stated.get(name):
            raise UnsupportedError(f"states {name}, which is not supported")
    crops, size = bool(stated.get("do_center_crop", "crop_size" in stated)), stated.get("size")
    crop = _sides(stated.get("crop_size")) if crops else None
    if not stated.get("do_resize", True):
        raise UnsupportedError("states do_resize false, and images of any size need a resize")
    filter_ = _filter(stated.get("resample", 2 if "ViT" in kind else 3))
    if filter_ is None:
        raise UnsupportedError(
            f"states the resample {reprlib.repr(stated['resample'])}, and only 2 and 3 are supported"
        )
    engine = "float" if kind.startswith("DINOv3") else "uint8" if kind.endswith("Fast") else "pil"
    found |= dict(filter=filter_, engine=engine)
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if not isinstance(size, Mapping):
        raise UnsupportedError(f"states the size {reprlib.repr(size)}, which is not supported")
    whole, short = _sides(size), size.get("shortest_edge")
    if whole is not None and crop in (None, whole):
        return found | dict(size=whole[0] if whole[0] == whole[1] else whole, fit="squash")
    if short is not None and "longest_edge" not in size and crop is not None and crop[0] == crop[1] <= short:
        return found | dict(size=crop[0], fit="crop", resize_to=_unless(short, crop[0]), crop_rounds="down")
    raise UnsupportedError(
        f"states the size {dict(size)} {'with' if crops else 'without'} a centre crop"
        f"{'' if crop is None else f' of {crop[0]}x{crop[1]}'}, which is not supported"
    )


def _levels(stated: Mapping[str, Any]) -> Stated:
    """Mean and std for pixels in 0..1, whatever the file divides by."""
    factor = stated.get("rescale_factor", 1 / _LEVELS) if stated.get("do_rescale", True) else 1
    if stated.get("rescale_offset") or stated.get("offset"):
        raise UnsupportedError("states an offset of the pixel values, which is not supported")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1e-6 < factor < 1e6:
        raise UnsupportedError(f"states the rescale_factor {reprlib.repr(factor)}, which is no number above 0")
    times = 1.0 if math.isclose(factor * _LEVELS, 1, rel_tol=1e-6) else factor * _LEVELS
    mean, std = stated.get("image_mean"), stated.get("image_std")
    if not stated.get("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    if not (isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) == len(std) > 0):
        if times != 1:
            raise UnsupportedError("states a rescale_factor without mean and std")
        return {}
    if times != 1 and all(isinstance(v, (int, float)) for v in (*mean, *std)):
        mean, std = [v / times for v in mean], [v / times for v in std]
    return {"mean": tuple(mean), "std": tuple(std)}


def _levels_alone(stated: Mapping[str, Any]) -> Stated:
    """Mean and std of a processor whose geometry is not supported."""
    try:
        return _levels(stated)
    except UnsupportedError:
        return _statistics(stated)


def _of_timm(stated: Mapping[str, Any]) -> Stated:
    """The fields of timm's pretrained_cfg.  Raises UnsupportedError for a transform that is not supported."""
    found, size = _statistics(stated), stated.get("input_size")
    if size is None:
        return found
    if not isinstance(size, (list, tuple)) or len(size) != 3 or not all(isinstance(s, int) and s > 0 for s in size):
        raise UnsupportedError(f"states the input_size {reprlib.repr(size)}, which is not supported")
    side = size[1] if size[1] == size[2] else tuple(size[1:])
    filter_ = _filter(stated.get("interpolation", "bicubic"))
    mode, share = stated.get("crop_mode", "center") or "center", stated.get("crop_pct", 0.875)
    if filter_ is None or mode not in ("center", "squash") or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise UnsupportedError(
            f"states interpolation {stated.get('interpolation')!r}, crop_mode {mode!r}, crop_pct {share!r}, "
            "which is not supported"
        )
    found |= dict(size=side, filter=filter_, engine="pil")
    if mode == "squash" and share == 1:
        return found | dict(fit="squash")
    if mode == "squash" or not isinstance(side, int):
        raise UnsupportedError(f"states crop_mode {mode!r} with crop_pct {share} of {size[1]}x{size[2]}")
    return found | dict(fit="crop", resize_to=_unless(math.floor(side / share), side))


def _filter(stated: Any) -> str | None:
    return _FILTERS.get(stated) if type(stated) in (int, str) else None


def _unless(short: int, side: int) -> int | None:
    return None if short == side else short


def _sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, Mapping) and isinstance(size.get("height"), int) and isinstance(size.get("width"), int):
        return size["height"], size["width"]
    return None
