"""From what a file holds to a `ViTConfig`, and from a `ViTConfig` to the config.json that transformers and timm read.

The tensors say nearly all.  What they cannot say (number of heads, epsilon of the norms, base of the RoPE) comes from
config.json, else from the row of the zoo that has the same shape, else from what all released models share.
"""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..images.preprocess import Preprocess
from ..model.layers import PositionResize, ViTConfig
from ..zoo import ARCHITECTURES, OWN, ModelInfo, find_architecture, preprocess_of, timm_model
from .layouts import Folded, Layout, Masked, row_of, sources

__all__ = [
    "complete",
    "contradiction",
    "hf_config",
    "hf_processor_config",
    "layout_hint",
    "reading_differs",
    "same_architecture",
    "settings_from_config",
    "shown_by_shapes",
    "timm_config",
]

# transformers' model types, and the epsilon that their config classes have where a config.json is silent
_HF_EPS = {"dinov3_vit": 1e-5, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "vit": 1e-12}
_REFUSED = {"dinov3_convnext": "a ConvNeXt, not a vision transformer; timm has it as convnext_*.dinov3_lvd1689m"}
_LONGEST = 2**18  # of any dimension: a position table of 512 x 512 has as many rows
_LARGEST = 10**9  # of any number in config.json: more overflows somewhere


def _model_type(config: Mapping[str, Any]) -> str | None:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def layout_hint(config: Mapping[str, Any]) -> str | None:
    """Whose config.json this is: "hf", "timm" or None.  Raises UnsupportedError for models that are not here."""
    kind = _model_type(config)
    if kind in _REFUSED:
        raise UnsupportedError(f"this checkpoint is {_REFUSED[kind]}")
    if "architecture" in config or "pretrained_cfg" in config:
        return "timm"
    return "hf" if kind in _HF_EPS else None


def settings_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a ViTConfig that a config.json states and that no tensor shows."""
    kind = _model_type(config)
    if kind in _HF_EPS:
        gated = config.get("use_gated_mlp", config.get("use_swiglu_ffn", False))
        activation = config.get("hidden_act", "gelu")
        if not gated and activation != "gelu":
            raise UnsupportedError(
                f"config.json asks for the activation {reprlib.repr(activation)}; DINO models use the exact 'gelu'"
            )
        rope = config.get("rope_parameters")
        theta = config.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
        found = {
            "num_heads": _positive("num_attention_heads", config.get("num_attention_heads"), int),
            "norm_eps": _positive("layer_norm_eps", config.get("layer_norm_eps", _HF_EPS[kind]), (int, float)),
            "rope_base": _positive("rope_theta", theta, (int, float)) if kind == "dinov3_vit" else None,
        }
        return {name: value for name, value in found.items() if value is not None}
    if isinstance(architecture := config.get("architecture"), str):
        row = find_architecture(architecture)
        if row is not None:
            return {name: getattr(row.config, name) for name in ("num_heads", "norm_eps", "rope_base")}
    return {}


def _positive(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is none or a number of this kind above 0 that a float can hold."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= _LARGEST):
        raise CheckpointError(f"config.json gives {name} as {reprlib.repr(value)}, which should be a number above 0")
    return value


def contradiction(shown: Mapping[str, Any], stated: Mapping[str, Any]) -> str | None:
    """What a config.json of transformers says and the tensors show otherwise."""
    if _model_type(stated) not in _HF_EPS:
        return None
    names = {
        "num_hidden_layers": "depth", "hidden_size": "embed_dim", "patch_size": "patch_size",
        "num_register_tokens": "num_registers",
    }  # fmt: skip
    for name, ours in names.items():
        if stated.get(name, shown[ours]) != shown[ours]:
            return f"config.json says {name} {reprlib.repr(stated[name])} and the tensors {shown[ours]}"
    return None


def shown_by_shapes(
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],  # by the layout's names on disk
) -> dict[str, Any]:
    """The fields of a ViTConfig that the tensors in a file show.

    Raises: CheckpointError where they are no whole ViT.
    """

    depth = _depth(layout, shapes)

    def shape(ours: str) -> tuple[int, ...] | None:
        """Of the first part of a row, in the first block that has all its parts: a gap is for the reader to find."""
        row, number = row_of(layout, ours)
        if row is None:
            return None
        for block in range(depth) if number else (0,):
            parts = sources(row, str(block))
            if all(name in shapes for name, needed in parts if needed):
                found = shapes[parts[0][0]]
                return found if max(found, default=0) <= _LONGEST else ()
        return None

    def needed(ours: str, dimensions: int) -> tuple[int, ...]:
        found = shape(ours)
        if found is None or len(found) != dimensions or 0 in found:
            row, number = row_of(layout, ours)
            name = sources(row, number)[0][0] if row is not None else ours
            fault = "missing" if found is None else f"of shape {list(found)}"
            raise CheckpointError(
                f"the names are those of layout {layout.label}, but '{name}' is {fault}; is the file whole?"
            )
        return found

    width = needed("cls_token", 3)[2]
    conv = needed("patch_embed.proj.weight", 4)
    if conv[1] != 3 or conv[2] != conv[3]:
        raise UnsupportedError(f"the patch embedding has shape {list(conv)}; only RGB and square patches are supported")
    fc2, gate_up = shape("blocks.0.mlp.fc2.weight"), shape("blocks.0.mlp.gate_up.weight")
    if gate_up is not None and layout.rows["blocks.#.mlp.gate_up.weight"] == layout.rows["blocks.#.mlp.fc1.weight"]:
        gated = fc2 is not None and len(fc2) == 2 and gate_up[:1] == (2 * fc2[1],)  # timm's giant, an MLP by name
    else:
        gated = gate_up is not None
    registers = shape("register_tokens")
    num_registers = registers[1] if registers is not None and len(registers) == 3 else 0
    positions = shape("pos_embed") if layout.family == "dinov3" else needed("pos_embed", 3)
    qkv_bias = shape("blocks.0.attn.qkv.bias") is not None
    shown: dict[str, Any] = dict(
        embed_dim=width,
        depth=depth,
        ffn_dim=needed(f"blocks.0.mlp.{'down' if gated else 'fc2'}.weight", 2)[1],
        gated=gated,
        patch_size=conv[2],
        num_registers=num_registers,
        position_grid=None if positions is None else _grid_side(layout, positions),
        position_resize=_resize_rule(layout, num_registers),
        qkv_bias=qkv_bias,
        key_bias=_key_bias(layout, shapes) if qkv_bias else positions is not None,
        layerscale=shape("blocks.0.ls1.gamma") is not None,
        mask_token=shape("mask_token") is not None,
        prefix_norm=shape("cls_norm.weight") is not None,
        local_cls_norm=shape("local_cls_norm.weight") is not None,
    )
    periods = shape("rope_periods")
    if periods is not None and len(periods) == 1 and periods[0]:
        shown["num_heads"] = max(1, width // (4 * periods[0]))
    return shown


def complete(
    shown: Mapping[str, Any],
    layout: Layout,
    settings: Mapping[str, Any],  # known from elsewhere, see `settings_from_config`
) -> tuple[ViTConfig, str | None]:
    """The config of the model in a file, and a sentence about what had to be assumed, if anything.

    Raises: InputError for numbers that do not go together.
    """
    fields = {**shown, **settings}
    assumed = []
    twin = next((c for c in ARCHITECTURES.values() if same_architecture(c, shown)), None)
    if "num_heads" not in fields:
        fields["num_heads"] = max(1, shown["embed_dim"] // 64) if twin is None else twin.num_heads
        if twin is None:
            assumed.append(f"{fields['num_heads']} heads of width 64")
    if "norm_eps" not in fields:
        fields["norm_eps"] = _usual_eps(layout, shown["key_bias"])
        if twin is None:
            assumed.append(f"a norm epsilon of {fields['norm_eps']:g}")
    note = f"the file does not state everything; taken: {', '.join(assumed)}" if assumed else None
    return ViTConfig(**fields), note


def _usual_eps(layout: Layout, key_bias: bool) -> float:
    """The epsilon of a file that does not state it."""
    if layout.name == "meta" and layout.family == "dinov3" and key_bias:
        return 1e-6  # an unmasked key bias comes from the training code's default config, and so does its epsilon
    return 1e-5 if layout.family == "dinov3" else 1e-6


def same_architecture(config: ViTConfig, other: Mapping[str, Any] | ViTConfig) -> bool:
    """Whether two configs have tensors of the same shapes, but for parts that some layouts leave out."""
    fields = ("embed_dim", "depth", "ffn_dim", "gated", "patch_size", "num_registers", "position_grid", "layerscale")
    values = other if isinstance(other, Mapping) else vars(other)
    return all(getattr(config, name) == values[name] for name in fields)


def _depth(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> int:
    row = layout.rows["blocks.#.norm1.weight"]
    assert isinstance(row, str)
    pattern = re.escape(row.partition("#")[0]) + r"(\d{1,3})\."
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    if not numbers:
        raise CheckpointError(f"the names look like layout {layout.label}, but there are no blocks; is the file whole?")
    return max(numbers) + 1


def _grid_side(layout: Layout, positions: tuple[int, ...]) -> int:
    count = positions[1] - (0 if isinstance(layout.rows["pos_embed"], Folded) else 1)
    side = math.isqrt(max(count, 0))
    if side == 0 or side * side != count:
        raise UnsupportedError(
            f"the position table has shape {list(positions)}, which is not a square grid; load a model at a square size"
        )
    return side


def _resize_rule(layout: Layout, num_registers: int) -> PositionResize:
    if num_registers or layout.name == "timm" or layout.family == "dinov3":
        return "antialias"
    return "offset" if layout.name == "meta" else "size"


def _key_bias(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    row, number = row_of(layout, "blocks.0.attn.qkv.bias")
    if row is None or isinstance(row, str):
        return True
    optional = [name.replace(".0.", r"\.\d+\.") for name, needed in sources(row, number) if not needed]
    present = any(re.fullmatch(pattern, name) for pattern in optional for name in shapes)
    return not present if isinstance(row, Masked) or not optional else present


def hf_config(config: ViTConfig) -> dict[str, Any]:
    """The config.json of transformers.  Raises UnsupportedError for what its models cannot do."""
    if config.prefix_norm:
        raise UnsupportedError(
            "transformers has no separate norm for class and register tokens; write the 'meta' layout"
        )
    common: dict[str, Any] = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
    }
    if config.position_grid is None:
        if not config.layerscale:
            raise UnsupportedError("transformers' DINOv3 always has layer scale; write the 'meta' layout")
        return common | {
            "architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit",
            "image_size": 224, "intermediate_size": config.ffn_dim,
            "use_gated_mlp": config.gated, "hidden_act": "silu" if config.gated else "gelu",
            "num_register_tokens": config.num_registers, "rope_theta": config.rope_base, "pos_embed_rescale": 2.0,
            "query_bias": config.qkv_bias, "value_bias": config.qkv_bias,
            "key_bias": config.qkv_bias and config.key_bias, "proj_bias": True, "mlp_bias": True,
            "layerscale_value": 1.0,
        }  # fmt: skip
    common |= {"image_size": config.position_grid * config.patch_size, "qkv_bias": config.qkv_bias}
    if not config.layerscale:
        if config.num_registers or config.gated or config.mask_token:
            raise UnsupportedError("transformers' ViT has no registers, gate or mask token; write the 'meta' layout")
        return common | {"architectures": ["ViTModel"], "model_type": "vit", "intermediate_size": config.ffn_dim}
    ratio = config.ffn_dim / config.embed_dim
    if config.gated:  # transformers makes 2/3 of mlp_ratio * hidden_size, rounded up to a multiple of 8
        ratio = 4 if (int(config.embed_dim * 4 * 2 / 3) + 7) // 8 * 8 == config.ffn_dim else 1.5 * ratio
    common |= {
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "use_swiglu_ffn": config.gated,
        "layerscale_value": 1.0,
    }
    if config.num_registers:
        name = {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
        return common | name | {"num_register_tokens": config.num_registers}
    return common | {"architectures": ["Dinov2Model"], "model_type": "dinov2", "use_mask_token": config.mask_token}


def hf_processor_config(config: ViTConfig, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The preprocessor_config.json of transformers: what its processor of this family does by default."""
    side = 224
    common: dict[str, Any] = {"image_mean": list(mean), "image_std": list(std), "rescale_factor": 1 / 255}
    common |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    if config.position_grid is None:
        side = 14 * config.patch_size
        name = {"image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2}
        return common | name | {"size": {"height": side, "width": side}}
    if not config.layerscale:
        return common | {
            "image_processor_type": "ViTImageProcessor",
            "resample": 2,
            "size": {"height": side, "width": side},
        }
    return common | {
        "image_processor_type": "BitImageProcessor", "resample": 3, "do_convert_rgb": True, "do_center_crop": True,
        "size": {"shortest_edge": 256}, "crop_size": {"height": side, "width": side},
    }  # fmt: skip


def timm_config(config: ViTConfig, info: ModelInfo | None, preprocess: Preprocess, with_bias: bool) -> dict[str, Any]:
    """The config.json of timm, whose architectures are names.  Raises UnsupportedError where none fits."""
    if info is None or info.timm_id is None or not same_architecture(info.config, config):
        raise UnsupportedError(
            "timm reads models of known names only, and this architecture has none; write the 'hf' or 'meta' layout"
        )
    architecture, _, tag = timm_model(info).partition(".")
    if with_bias and info.family == "dinov3":
        architecture = architecture.replace("_dinov3", "_dinov3_qkvb")
    theirs = preprocess_of(info, "timm")
    side = theirs.size
    assert isinstance(side, int)
    origin = {} if info.licence == OWN else {"tag": tag, "license": info.licence.lower().replace(" ", "-")}
    return {
        "architecture": architecture, "num_classes": 0, "num_features": config.embed_dim,
        "global_pool": "avg" if info.family == "dinov3" else "token",
        "pretrained_cfg": {
            **origin, "input_size": [3, side, side], "fixed_input_size": True, "interpolation": theirs.filter,
            "crop_pct": round(side / (theirs.resize_to or side), 3),
            "crop_mode": "center" if theirs.fit == "crop" else theirs.fit,
            "mean": list(preprocess.mean), "std": list(preprocess.std), "num_classes": 0, "pool_size": None,
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


def reading_differs(config: ViTConfig, layout: Layout) -> list[str]:
    """What readers of a layout will do differently from this model, in words."""
    notes = []
    if config.position_grid is not None and _resize_rule(layout, config.num_registers) != config.position_resize:
        notes.append(
            f"readers of the {layout.name} layout resize positions by another rule, "
            f"so features off the {config.position_grid}x{config.position_grid} grid will differ by about 1 %"
        )
    usual = _usual_eps(layout, config.key_bias)
    if layout.name != "hf" and config.norm_eps != usual:
        notes.append(
            f"the {layout.name} layout does not say the norm epsilon {config.norm_eps:g}; readers take {usual:g}"
        )
    return notes
