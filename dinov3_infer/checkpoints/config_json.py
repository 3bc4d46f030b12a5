"""Writes a config and its transform as the JSON files that transformers and timm read."""

from dataclasses import replace
from typing import Any

from ..errors import UnsupportedError
from ..images.preprocess import Preprocess
from ..model.convnext import ConvNeXtConfig
from ..zoo import OWN, Config, ModelInfo, preprocess_of, timm_model
from .architecture import rows_like, same_architecture
from .stages import hf_stages

__all__ = ["hf_config", "hf_processor_config", "is_default", "not_held", "sentence_transformers_files", "timm_config"]


def hf_config(config: Config) -> dict[str, Any]:
    """The config.json of transformers.

    Raises: UnsupportedError if the models of transformers lack a part of this network.
    """
    if isinstance(config, ConvNeXtConfig):
        return hf_stages(config)
    if config.prefix_norm:
        raise UnsupportedError(
            "transformers has no separate norm for class and register tokens; write the 'meta' layout"
        )
    common: dict[str, Any] = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
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
        return common | {
            "architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers",
            "num_register_tokens": config.num_registers,
        }  # fmt: skip
    return common | {"architectures": ["Dinov2Model"], "model_type": "dinov2", "use_mask_token": config.mask_token}


def is_default(preprocess: Preprocess, info: ModelInfo | None) -> bool:
    """Whether this is the default transform of a model, apart from mean and std."""
    return info is not None and replace(preprocess_of(info), mean=preprocess.mean, std=preprocess.std) == preprocess


def not_held(preprocess: Preprocess, layout: str) -> str:
    """The part of a transform that the files of transformers or timm cannot store; "" if there is none."""
    side = preprocess.size
    if preprocess.fit not in ("squash", "crop"):
        return f"fit {preprocess.fit!r}"
    if not isinstance(side, int) and (preprocess.fit == "crop" or layout == "timm"):
        return f"a {preprocess.fit} to the size {side}"
    return "levels in float" if layout == "hf" and preprocess.engine == "float" and preprocess.fit == "crop" else ""


def hf_processor_config(config: Config, preprocess: Preprocess, info: ModelInfo | None) -> dict[str, Any]:
    """The preprocessor_config.json of transformers: the default of the family's processor.

    A custom transform is written exactly if transformers supports it.
    """
    common: dict[str, Any] = {
        "image_mean": list(preprocess.mean), "image_std": list(preprocess.std), "rescale_factor": 1 / 255,
        "do_resize": True, "do_rescale": True, "do_normalize": True,
    }  # fmt: skip
    if not is_default(preprocess, info) and not not_held(preprocess, "hf"):
        side = preprocess.size
        height, width = side if isinstance(side, tuple) else (side, side)
        fast = "" if preprocess.engine == "pil" else "Fast"
        common["resample"] = 3 if preprocess.filter == "bicubic" else 2
        if preprocess.fit == "squash":
            kind = "DINOv3ViTImageProcessorFast" if preprocess.engine == "float" else f"ViTImageProcessor{fast}"
            return common | {"image_processor_type": kind, "size": {"height": height, "width": width}}
        return common | {
            "image_processor_type": f"BitImageProcessor{fast}", "do_convert_rgb": True, "do_center_crop": True,
            "size": {"shortest_edge": preprocess.resize_to or side}, "crop_size": {"height": height, "width": width},
        }  # fmt: skip
    if config.position_grid is None or not config.layerscale:
        dinov3 = config.position_grid is None
        side = 14 * min(16, config.patch_size) if dinov3 else 224
        return common | {
            "image_processor_type": "DINOv3ViTImageProcessorFast" if dinov3 else "ViTImageProcessor",
            "resample": 2,
            "size": {"height": side, "width": side},
        }
    return common | {
        "image_processor_type": "BitImageProcessor", "resample": 3, "do_convert_rgb": True, "do_center_crop": True,
        "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
    }  # fmt: skip


def sentence_transformers_files(width: int, preprocess: Preprocess, info: ModelInfo | None) -> dict[str, Any]:
    """Files with which sentence-transformers gives the class token of our transform.

    Without them it returns the mean of all tokens, including the class token and the registers.  The transform is
    stored as arguments of the processor, because preprocessor_config.json states that of transformers; see
    `hf_processor_config`.

    Source: sentence_transformers, release 6.2.0: base/model.py, base/modules/transformer.py and
    sentence_transformer/modules/pooling.py.
    """
    transformer: dict[str, Any] = {
        "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
        "modality_config": {"image": {"method": "forward", "method_output_name": "last_hidden_state"}},
    }  # fmt: skip
    if is_default(preprocess, info) and preprocess.fit == "squash" and isinstance(preprocess.size, int):
        transformer["processing_kwargs"] = {
            "image": {
                "do_center_crop": False,
                "resample": 3 if preprocess.filter == "bicubic" else 2,
                "size": {"height": preprocess.size, "width": preprocess.size},
            }
        }
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
            {
                "idx": 1, "name": "1", "path": "1_Pooling",
                "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            },
        ],
        "sentence_bert_config.json": transformer,
        "1_Pooling/config.json": {"embedding_dimension": width, "pooling_mode": "cls", "include_prompt": True},
    }  # fmt: skip


def timm_config(config: Config, info: ModelInfo | None, preprocess: Preprocess, with_bias: bool) -> dict[str, Any]:
    """The config.json of timm, which names architectures.

    Raises: UnsupportedError if timm has no architecture like this.
    """
    row = info or next((row for row in rows_like(config) if row.timm_id), None)  # only for its name
    if row is None or row.timm_id is None or not same_architecture(row.config, config):
        raise UnsupportedError(
            "timm reads only architectures that it has a name for, and this is none; write the 'hf' or 'meta' layout"
        )
    architecture, _, tag = timm_model(row).partition(".")
    if with_bias and row.family == "dinov3":
        architecture = architecture.replace("_dinov3", "_dinov3_qkvb")
    own = not is_default(preprocess, info) and not not_held(preprocess, "timm")
    theirs = preprocess if own else preprocess_of(row, "timm")
    side = theirs.size
    assert isinstance(side, int)
    short = theirs.resize_to or side
    share = round(side / (short + 0.5), 6) if own and short != side else round(side / short, 3)  # timm rounds down
    named = info is not None and info.licence != OWN
    origin = {"license": row.licence.lower().replace(" ", "-")} if named else {}
    if named and not row.derived:
        origin["tag"] = tag
    stages = isinstance(config, ConvNeXtConfig)
    grid = [side // config.patch_size] * 2
    return {
        "architecture": architecture, "num_classes": 0, "num_features": config.embed_dim,
        "global_pool": "avg" if stages or row.family in ("dinov3", "eupe") else "token",
        "pretrained_cfg": {
            **origin, "input_size": [3, side, side], "fixed_input_size": not stages, "interpolation": theirs.filter,
            "crop_pct": share,
            "crop_mode": "center" if theirs.fit == "crop" else theirs.fit,
            "mean": list(preprocess.mean), "std": list(preprocess.std), "num_classes": 0,
            "pool_size": grid if stages else None, "first_conv": "stem.0" if stages else "patch_embed.proj",
            "classifier": "head.fc" if stages else "head",
        },
    }  # fmt: skip
