"""Writes checkpoints: the layout tables read backwards."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, InputError, UnsupportedError
from ..images.preprocess import Preprocess
from ..model.network import Network
from ..model.rope import rope_periods
from ..model.vit import ViTConfig
from ..system import whole
from ..zoo import OWN, Config, ModelInfo
from . import layouts
from .architecture import reading_differs, rows_like, same_architecture
from .config_json import (
    hf_config,
    hf_processor_config,
    is_default,
    not_held,
    sentence_transformers_files,
    timm_config,
)
from .layouts import Layout, LayoutName, Parts, layout_for
from .reading import INDEX, METADATA, WEIGHTS, read_index
from .transforms import transform_of

__all__ = ["our_block", "restore", "save_checkpoint", "write_folder"]

_WITH_LOCAL_NORM = ("dinov3_vit7b16", "dinov3_vit7b16_sat493m", "dinov3_vitl16_sat493m")  # dinov3 at 6876159

log = logging.getLogger("dinov3_infer")


def restore(
    state: Mapping[str, Tensor], config: Config, layout: Layout, with_bias: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename our tensors to a layout's names.

    Args:
        state: Our names and tensors, of the shapes in the model.
        config: The config of the model.
        layout: The layout.
        with_bias: Write the qkv biases of timm's DINOv3.

    Returns: The layout's names and tensors, and a sentence for each tensor that the layout cannot store.

    Raises:
        UnsupportedError: Leaving a tensor out would change the features.
    """
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    table = layout.parts(config.depth)
    for ours, tensor in state.items():
        parts = table.get(ours)
        if parts is None:
            notes.append(_note_of_loss(ours, layout, tensor, config))
        elif layout is layouts.TIMM_V3 and ours.endswith("attn.qkv.bias") and not with_bias:
            continue  # timm's plain variant has no biases, and these are zero
        elif layout is layouts.META_V3 and ours == "rope_periods":
            rounded = tensor.bfloat16()
            tensors["rope_embed.periods"] = rounded if torch.equal(rounded.float(), tensor) else tensor
        elif parts.form == "folded":
            tensors["cls_token"] = state["cls_token"] + tensor[:, :1]
            tensors[parts.names[0]] = tensor[:, 1:]
            if tensor[:, 0].any():
                notes.append(
                    "timm adds the position of the class token to the token, so they cannot be separated again"
                )
        else:
            tensors.update(_write(parts, ours, tensor, config))
    if layout is layouts.HF_V3 and "register_tokens" not in state:
        tensors["embeddings.register_tokens"] = torch.zeros(1, 0, config.embed_dim, dtype=torch.float32, device="cpu")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, [
        note for note in dict.fromkeys(notes) if note
    ]


def _write(parts: Parts, ours: str, tensor: Tensor, config: Config) -> dict[str, Tensor]:
    """One of our tensors under the layout's names."""
    names = parts.names
    masked_key = ours.endswith("attn.qkv.bias") and isinstance(config, ViTConfig) and not config.key_bias
    if parts.form == "masked":
        mask = torch.ones_like(tensor)
        mask.chunk(3)[1].zero_()
        return {names[0]: tensor} | ({names[1]: mask} if masked_key else {})
    if parts.form == "joined":
        if not masked_key and "" in names:  # zeros, see `layouts.ZEROS`
            raise UnsupportedError(
                "timm's DINOv3 has no bias for the keys, but this model has one; write the 'hf' or 'meta' layout"
            )
        chunks = zip(names, tensor.chunk(len(names)), strict=True)
        return {name: chunk for name, chunk in chunks if not masked_key or name not in parts.optional}
    if parts.form == "twice":
        return {names[0]: tensor, names[1]: tensor.clone()}
    return {names[0]: tensor[None] if parts.form == "nested" else tensor}


def _note_of_loss(ours: str, layout: Layout, tensor: Tensor, config: Config) -> str:
    """A sentence about a tensor that a layout cannot store; "" if nothing is lost."""
    if ours == "rope_periods":
        if _are_exact(tensor, config):
            return ""
        reader = "transformers" if layout.name == "hf" else "timm"
        return f"the {layout.name} layout stores no RoPE periods, so {reader} will use exact ones"
    if "lora_" in ours or "base_layer" in ours:
        raise UnsupportedError(f"the model has an adapter that is not merged ({ours}); merge it into the weights first")
    if ours == "mask_token" or ours.startswith("local_cls_norm"):
        return f"the {layout.name} layout has no place for {ours.split('.')[0]}, which only training uses"
    other = "another layout" if layout.name == "meta" else "the 'meta' layout"
    raise UnsupportedError(f"the {layout.name} layout has no place for {ours}; write {other}")


def save_checkpoint(
    model: Network,
    target: str | os.PathLike[str],
    layout: LayoutName,
    info: ModelInfo | None,
    preprocess: Preprocess,
) -> Path:
    """Write a model: a folder for "hf" and "timm", a `.pth` or `.safetensors` file for "meta".

    Each loss of a layout is logged as a warning.  Files are written atomically, even over the file that the model was
    loaded from.

    Args:
        model: The network.
        target: The folder or file.
        layout: "hf", "meta" or "timm".
        info: The model of the zoo, for its name and licence.
        preprocess: The transform.

    Returns: The path.

    Raises:
        InputError: `target` is a file where the layout needs a folder, or the reverse, or has a wrong suffix.
        UnsupportedError: The layout cannot store this model.
        DiskError: The disk refuses the file.

    Example:
        >>> save_checkpoint(bb, "folder", "hf", bb.info, bb.preprocess)
    """
    target = Path(target).expanduser()
    table = layout_for(model.config, layout)
    if info is not None and not same_architecture(info.config, model.config):  # blocks were removed or added
        info = None
    if layout == "meta" and target.suffix not in (".pth", ".safetensors"):
        raise InputError(f"the meta layout is one file; '{target}' should end in .pth or .safetensors")
    if target.is_dir() if layout == "meta" else target.is_file():
        kinds = ("one file", "a folder") if layout == "meta" else ("a folder", "a file")
        raise InputError(f"the {layout} layout is {kinds[0]}, and '{target}' is {kinds[1]}; give another path")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    # timm has DINOv3 without biases too, but not LingBot
    with_bias = (info is not None and info.family != "dinov3") or any(
        name.endswith("qkv.bias") and bool(tensor.any()) for name, tensor in state.items()
    )
    files: dict[str, Any] = {}
    block = our_block(model, info, preprocess)
    if layout == "hf":
        dtype = str(model.main_weight.dtype).removeprefix("torch.")
        files["config.json"] = hf_config(model.config) | {"dtype": dtype, "dinov3_infer": block}
        files["preprocessor_config.json"] = hf_processor_config(model.config, preprocess, info)
        files |= sentence_transformers_files(model.width(), preprocess, info)
    elif layout == "timm":
        stated = timm_config(model.config, info, preprocess, with_bias)
        tagged = "tag" in stated["pretrained_cfg"] and block.keys() == {"name"}
        files["config.json"] = stated if tagged else stated | {"dinov3_infer": block}
    tensors, notes = restore(state, model.config, table, with_bias)
    is_vit = isinstance(model.config, ViTConfig)
    if layout == "meta" and is_vit and (made := _complete(tensors, model.config, table, info)):
        notes.append(f"added {', '.join(made)}, which Meta's strict loaders need and no feature uses")
    if target.suffix == ".pth" and (info is not None or preprocess != transform_of(model.config, info)):
        notes.append("a .pth file stores no name and no transform; a .safetensors file does")
    if layout != "meta" and not is_default(preprocess, info) and (what := not_held(preprocess, layout)):
        notes.append(
            f"{layout} cannot store {what}, so its readers use the family's default transform; this package does not"
        )
    for note in notes + reading_differs(model.config, table):
        log.warning("%s: %s", target, note)
    facts: dict[str, Any] = dict(layer_norm_eps=model.config.norm_eps)
    if isinstance(model.config, ViTConfig):
        facts["num_attention_heads"] = model.config.num_heads
    facts |= dict(dinov3_infer=block | {"preprocess": asdict(preprocess)})
    if layout == "meta":
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_tensors(target, tensors, facts)
    else:
        write_folder(target, tensors, facts, files)
    return target


def write_folder(
    target: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """Write the weights and JSON files of one model to a folder, and remove the shards of an earlier model.

    Args:
        target: The folder, which is created if it is missing.
        tensors: The layout's names and tensors, of any shape.
        facts: Settings that the tensors do not show, for the header of the weights file.
        files: File name -> JSON content.

    Raises: DiskError if the disk refuses a file.
    """
    target.mkdir(parents=True, exist_ok=True)
    _write_tensors(target / WEIGHTS, tensors, facts)
    for name, content in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        with whole(target / name) as path:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _remove_shards(target)


def _complete(tensors: dict[str, Tensor], config: ViTConfig, table: Layout, info: ModelInfo | None) -> list[str]:
    """Add tensors that Meta's files of this architecture have and other layouts drop; returns their descriptions."""
    row = info or next(iter(rows_like(config)), None)
    width, first, made = config.embed_dim, tensors["cls_token"], []
    if table is not layouts.META_V1 and "mask_token" not in tensors:
        tensors["mask_token"] = first.new_zeros(1, width)
        made.append("a mask token of zeros")
    known = None if row is None else row.config
    if table is layouts.META_V3 and not config.qkv_bias and isinstance(known, ViTConfig) and known.qkv_bias:
        mask = first.new_ones(3, width).index_fill(0, torch.tensor([1]), 0.0).flatten()
        for block in range(config.depth):
            name = f"blocks.{block}.attn.qkv.bias"
            tensors |= {name: torch.zeros_like(mask), f"{name}_mask": mask.clone()}
        made.append("biases of zero for queries, keys and values, with their mask")
    if row is not None and row.name in _WITH_LOCAL_NORM and "local_cls_norm.weight" not in tensors:
        tensors |= {f"local_cls_norm.{kind}": tensors[f"norm.{kind}"].clone() for kind in ("weight", "bias")}
        made.append("a norm for local crops, a copy of the other")
    return made


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, whose order varies, so that equal models give equal files."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def our_block(model: Network, info: ModelInfo | None, preprocess: Preprocess) -> dict[str, Any]:
    """The facts that the configs of other libraries have no field for."""
    block: dict[str, Any] = {"name": info.name if info else None}
    if info is not None and info.licence == OWN:
        block["from_scratch"] = True
    if info is not None and info.derived:
        block["derived"] = True
    if model.rope_periods is not None and not _are_exact(model.rope_periods, model.config):
        block["rope_periods"] = model.rope_periods.tolist()
    if not is_default(preprocess, info):
        block["preprocess"] = asdict(preprocess)
    return block


def _are_exact(periods: Tensor, config: Any) -> bool:
    return torch.equal(periods.cpu(), rope_periods(config.head_dim, config.rope_base))


def _remove_shards(folder: Path) -> None:
    """Remove the shards of an earlier save, which readers would prefer to the new file."""
    index = folder / INDEX
    if index.is_file():
        shards: set[str] = set()
        with contextlib.suppress(CheckpointError):  # a damaged index is removed all the same
            shards = set(read_index(index).values()) - {WEIGHTS}
        index.unlink()
        for shard in shards:
            (folder / shard).unlink(missing_ok=True)


def _write_tensors(target: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the tensors; `facts` go into the header of a safetensors file."""
    with whole(target) as path:
        if target.suffix == ".pth":
            torch.save(tensors, path)
        else:  # safetensors refuses tensors that share memory, such as parts of a split
            own = {n: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for n, t in tensors.items()}
            save_file(own, path, metadata={"format": "pt", METADATA: json.dumps(facts)})
            _sort_metadata(path)
