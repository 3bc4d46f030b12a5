"""Small transformers models as files of every layout; the translation here does not use the package's tables."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import SMALL, hf_tokens, tokens, worst_token
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3_infer import Backbone, ViTConfig, zoo
from dinov3_infer.checkpoints.describe import describe
from dinov3_infer.checkpoints.loading import load_model
from dinov3_infer.checkpoints.reading import Checkpoint, TensorsInMemory

State = dict[str, Tensor]
# transformers multiplies q, k and v separately, so float32 sums have another order; measured: 5e-7 per token.
SAME = 1e-5
# DINO v1 with the epsilon of Meta's and timm's code; another test covers that of transformers (1e-12).
# The model without biases has another width, so that the shapes alone identify the rows of the zoo below.
SOURCES: dict[str, ViTConfig] = SMALL | {
    "dino": replace(SMALL["dino"], norm_eps=1e-6),
    "dinov3_no_bias": replace(SMALL["dinov3_no_bias"], ffn_dim=112),
}


def family_of(config: ViTConfig) -> str:
    return "dinov3" if config.position_grid is None else "dinov2" if config.layerscale else "dino"


def plain_named(hf: State, config: ViTConfig) -> State:
    """Renames transformers' tensors to the names of Meta and timm, with q, k, v and gate, up still separate."""
    changes = (
        (r"^(model\.layer|encoder\.layer|layers)\.", "blocks."),
        (r"^embeddings\.patch_embeddings(\.projection)?\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"^layernorm\.", "norm."),
        (r"attention\.o_proj", "attn.proj"),
        (r"attention\.(\w)_proj", r"attn.\1"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    )
    if not config.gated:
        changes += ((r"mlp\.up_proj", "mlp.fc1"), (r"mlp\.down_proj", "mlp.fc2"))
    out: State = {}
    for name, tensor in hf.items():
        for pattern, replacement in changes:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor.clone()
    return out


def fuse(state: State, new: str, olds: tuple[str, ...]) -> None:
    """Concatenates blocks.N.<old>.{weight,bias} as blocks.N.<new>; a missing bias counts as zero."""
    for kind in ("weight", "bias"):
        for first in [n for n in state if n.endswith(f".{olds[0]}.{kind}")]:
            block = first[: -len(f"{olds[0]}.{kind}")]
            parts = [state.pop(f"{block}{old}.{kind}", None) for old in olds]
            known = next(p for p in parts if p is not None)
            state[f"{block}{new}.{kind}"] = torch.cat([torch.zeros_like(known) if p is None else p for p in parts])


def rename(state: State, pattern: str, replacement: str) -> None:
    for name in [n for n in state if re.search(pattern, n)]:
        state[re.sub(pattern, replacement, name)] = state.pop(name)


def meta_named(hf: State, config: ViTConfig) -> State:
    """A state dict in Meta's layout; DINOv3 has exact periods and masks 1, 0, 1."""
    state = plain_named(hf, config)
    fuse(state, "attn.qkv", ("attn.q", "attn.k", "attn.v"))
    if family_of(config) == "dinov3":
        state["mask_token"] = state["mask_token"][0]
        rename(state, "^register_tokens$", "storage_tokens")
        for name in [n for n in state if n.endswith("qkv.bias") and not config.key_bias]:
            state[f"{name}_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(config.embed_dim)
            state[name][config.embed_dim : 2 * config.embed_dim] = 5.0  # values under the mask must not matter
        state["rope_embed.periods"] = 100.0 ** (torch.arange(config.head_dim // 4) * 4 / config.head_dim)
        for old, new in (("gate", "w1"), ("up", "w2")):
            rename(state, rf"mlp\.{old}_proj", f"mlp.{new}")
    fuse(state, "mlp.w12", ("mlp.gate_proj", "mlp.up_proj"))
    rename(state, r"mlp\.down_proj", "mlp.w3")
    return state


def timm_named(hf: State, config: ViTConfig) -> State:
    """A state dict in timm's layout; the variant with query and value biases if the source has them."""
    state = plain_named(hf, config)
    state.pop("mask_token", None)
    rename(state, "^register_tokens$", "reg_token")
    if family_of(config) == "dinov3":
        rename(state, r"attn\.([qv])\.bias", r"attn.\1_bias")
        rename(state, r"\.ls(\d)\.gamma", r".gamma_\1")
        rename(state, r"mlp\.gate_proj", "mlp.fc1_g")
        rename(state, r"mlp\.up_proj", "mlp.fc1_x")
    elif config.num_registers:
        state["cls_token"] += state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    fuse(state, "attn.qkv", ("attn.q", "attn.k", "attn.v"))
    fuse(state, "mlp.fc1", ("mlp.gate_proj", "mlp.up_proj"))
    rename(state, r"mlp\.down_proj", "mlp.fc2")
    return state


def timm_name(key: str) -> str:
    return f"vit_{key}_dinov3" if SOURCES[key].position_grid is None else f"vit_{key}_x"


def put(folder: Path, tensors: State, config: dict[str, Any] | None = None, file: str = "model.safetensors") -> Path:
    """Writes tensors in the format of the suffix; returns the file, or the folder if it has a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization="legacy" not in file)
    if config is None:
        return path
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hub(folder: Path, model: nn.Module) -> Path:
    """A folder as on the hub: transformers writes it, with the old names of the blocks."""
    model.save_pretrained(folder)
    return folder


FORMS: dict[str, Callable[[Path, nn.Module, str], Path]] = {
    "hf_hub": lambda d, m, key: hub(d, m),
    "hf_shards": lambda d, m, key: (m.save_pretrained(d, max_shard_size="60KB"), d)[1],
    "hf_live_names": lambda d, m, key: put(d, m.state_dict(), m.config.to_dict()),
    "hf_live_pth": lambda d, m, key: put(d, m.state_dict(), None, "own.pth"),
    "hf_live_bare": lambda d, m, key: put(d, m.state_dict(), None, "own.safetensors"),
    "meta_pth": lambda d, m, key: put(d, meta_named(m.state_dict(), SOURCES[key]), None, "own.pth"),
    "meta_legacy_pth": lambda d, m, key: put(d, meta_named(m.state_dict(), SOURCES[key]), None, "legacy.pth"),
    "meta_safetensors": lambda d, m, key: put(d, meta_named(m.state_dict(), SOURCES[key]), None, "own.safetensors"),
    "timm": lambda d, m, key: put(d, timm_named(m.state_dict(), SOURCES[key]), {"architecture": timm_name(key)}),
    "timm_bin": lambda d, m, key: put(
        d, timm_named(m.state_dict(), SOURCES[key]), {"architecture": timm_name(key)}, "pytorch_model.bin"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_models_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds rows for the small models to the zoo, so that they can be loaded by name."""
    for key, config in SOURCES.items():
        monkeypatch.setitem(zoo.ARCHITECTURES, f"small_{key}", config)
        row = zoo.ModelInfo(
            f"small_{key}", f"small_{key}", family_of(config), "none", timm_id=f"timm/{timm_name(key)}.t"
        )
        monkeypatch.setitem(zoo.MODELS, row.name, row)


def load(path: Path, **options: Any) -> Backbone:
    return Backbone.from_pretrained(path, device="cpu", **options)


def in_memory(tensors: State, config: dict[str, Any] | None = None) -> Backbone:
    return load_model(Backbone, describe(Checkpoint("a.file", TensorsInMemory(tensors), config or {})))


def pixels_for(config: ViTConfig) -> Tensor:
    """Pixels [2, 3, H_px, W_px] on the grid of learned positions, where all resizing rules agree; else not square."""
    side = (config.position_grid or 3) * config.patch_size
    return torch.randn(2, 3, side, side if config.position_grid else 4 * config.patch_size)


def same_features(ours: Backbone, hf: nn.Module) -> None:
    pixels = pixels_for(ours.config)
    with torch.no_grad():
        assert worst_token(tokens(ours(pixels)), hf_tokens(hf, pixels)) < SAME


def wrapped(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}
