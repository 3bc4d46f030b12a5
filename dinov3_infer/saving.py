"""Writing checkpoints: the key tables read backwards."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import keys
from .configs import hf_config, hf_processor_config, timm_config
from .errors import InputError, UnsupportedError
from .keys import Folded, Joined, Layout, Masked, Nested, row_of, sources
from .rope import rope_periods
from .vit import VisionTransformer, ViTConfig
from .weights import LayoutName
from .zoo import ModelInfo

__all__ = ["restore", "save_checkpoint"]

log = logging.getLogger("dinov3_infer")


def restore(
    state: Mapping[str, Tensor], config: ViTConfig, layout: Layout, with_bias: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Our tensors under a layout's names, and what the layout has no place for, in words.

    Raises: UnsupportedError where leaving something out would change the features.
    """
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for ours, tensor in state.items():
        row, number = row_of(layout, ours)
        if row is None:
            notes.append(_note_of_loss(ours, layout, tensor, config))
        elif layout is keys.TIMM_V3 and ours.endswith("attn.qkv.bias") and not with_bias:
            continue  # timm's plain variant has no biases, and these are zero
        elif layout is keys.META_V3 and ours == "rope_periods":
            rounded = tensor.bfloat16()
            tensors["rope_embed.periods"] = rounded if torch.equal(rounded.float(), tensor) else tensor
        elif isinstance(row, Folded):
            tensors["cls_token"] = state["cls_token"] + tensor[:, :1]
            tensors[row.name] = tensor[:, 1:]
            if tensor[:, 0].any():
                notes.append("timm adds the position of the class token to the class token, and the two stay one")
        else:
            tensors.update(_write(row, number, ours, tensor, config))
    if layout is keys.HF_V3 and not config.num_registers:
        tensors["embeddings.register_tokens"] = torch.zeros(1, 0, config.embed_dim)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, [
        note for note in dict.fromkeys(notes) if note
    ]


def _write(row: keys.Row, number: str, ours: str, tensor: Tensor, config: ViTConfig) -> dict[str, Tensor]:
    """One tensor of ours under the layout's names."""
    parts = sources(row, number)
    first = parts[0][0]
    masked_key = ours.endswith("attn.qkv.bias") and not config.key_bias
    if isinstance(row, Masked):
        mask = torch.ones_like(tensor)
        mask.chunk(3)[1].zero_()
        return {first: tensor} | ({parts[1][0]: mask} if masked_key else {})
    if isinstance(row, Joined):
        if not masked_key and keys.ZEROS in row.parts:
            raise UnsupportedError(
                "timm's DINOv3 has no bias for the keys and this model has one; write the 'hf' or 'meta' layout"
            )
        chunks = zip(parts, tensor.chunk(len(parts)), strict=True)
        return {name: chunk for (name, needed), chunk in chunks if needed or not masked_key}
    return {first: tensor[None] if isinstance(row, Nested) else tensor}


def _note_of_loss(ours: str, layout: Layout, tensor: Tensor, config: ViTConfig) -> str:
    """What it means that a layout has no place for a tensor; "" for nothing."""
    if ours == "rope_periods":
        exact = rope_periods(config.head_dim, config.rope_base)
        if torch.equal(tensor.cpu(), exact):
            return ""
        reader = "transformers" if layout.name == "hf" else "timm"
        return f"the {layout.name} layout holds no RoPE periods, so {reader} will use exact ones"
    if ours == "mask_token" or ours.startswith("local_cls_norm"):
        return f"the {layout.name} layout has no place for {ours.split('.')[0]}, which only training uses"
    raise UnsupportedError(f"the {layout.name} layout has no place for {ours}; write the 'meta' layout")


def layout_for(config: ViTConfig, name: LayoutName) -> Layout:
    """The table that writes this architecture in layout `name`."""
    family = "dinov3" if config.position_grid is None else "dinov2" if config.layerscale else "dino"
    for_others = (keys.HF_V2_GATED_LIVE, keys.TIMM_V2 if config.num_registers else keys.TIMM_V2_REG)
    for candidate in keys.LAYOUTS:
        if (candidate.name, candidate.family) == (name, family) and candidate not in for_others:
            return candidate
    raise InputError(f"layout is one of 'hf', 'meta', 'timm'; got {name!r}")


def save_checkpoint(
    model: VisionTransformer,
    target: str | os.PathLike[str],
    layout: LayoutName = "hf",
    info: ModelInfo | None = None,
    extra: Mapping[str, Any] | None = None,  # our own block in config.json; its mean and std go to the processor too
) -> Path:
    """Writes a layout: a directory for "hf" and "timm", a `.pth` or `.safetensors` file for "meta".

    What the layout cannot hold is said in one line each.  A file appears whole or not at all, also over the file that
    the model was loaded from.
    """
    target = Path(target).expanduser()
    table = layout_for(model.config, layout)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if layout == "meta" and target.suffix not in (".pth", ".safetensors"):
        raise InputError(f"Meta's layout is one file; '{target}' should end in .pth or .safetensors")
    config: dict[str, Any] = {}
    with_bias = True
    if layout == "hf":
        dtype = str(model.patch_embed.proj.weight.dtype).removeprefix("torch.")
        config = hf_config(model.config) | {"dtype": dtype, "dinov3_infer": dict(extra or {})}
    elif layout == "timm":
        # timm has DINOv3 without biases too, but not LingBot
        with_bias = (info is not None and info.family != "dinov3") or any(
            name.endswith("qkv.bias") and bool(t.any()) for name, t in state.items()
        )
        config = timm_config(model.config, info, with_bias)
    tensors, notes = restore(state, model.config, table, with_bias)
    for note in notes:
        log.warning("%s: %s", target, note)
    if layout == "meta":
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(
            target,
            lambda path: torch.save(tensors, path) if target.suffix == ".pth" else save_file(_unshared(tensors), path),
        )
        return target
    if target.is_file():
        raise InputError(f"the {layout} layout is a directory, and '{target}' is a file; give another path")
    target.mkdir(parents=True, exist_ok=True)
    _replace(target / "model.safetensors", lambda path: save_file(_unshared(tensors), path, metadata={"format": "pt"}))
    _write_json(target / "config.json", config)
    if layout == "hf" and extra is not None:
        _write_json(target / "preprocessor_config.json", hf_processor_config(model.config, extra["mean"], extra["std"]))
    return target


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory, as the parts of a split do."""
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in tensors.items()
    }


def _write_json(target: Path, content: Mapping[str, Any]) -> None:
    _replace(target, lambda path: path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n"))


def _replace(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside the target, then takes its place."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
