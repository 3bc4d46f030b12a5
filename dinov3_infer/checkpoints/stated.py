"""Facts in a config.json that no tensor shows: number of heads, epsilon, RoPE base, activation.

The config.json is that of transformers, of any model type, or that of timm, which names architectures.
"""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .recognise import HF_EPS

__all__ = ["Statement", "stated", "timm_heads"]

_LARGEST = 10**9  # largest number in config.json; larger ones may overflow
_SECTIONS = ("vision_config", "backbone_config", "encoder_config", "vision_encoder_config")  # inside a larger model
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "vision_num_heads")
_EPS = ("layer_norm_eps", "norm_eps", "layernorm_eps")

Statement = tuple[dict[str, Any], str]  # fields of a ViTConfig, and where they are stated

# Heads of timm 1.0.31 by size in the architecture's name; the first match is used.
_TIMM_HEADS = (
    (r"giant_.*(dinov2|tipsv2|lingbot)", 24), (r"base_patch16_gap", 16), (r"huge_plus_", 20),
    (r"tiny_", 3), (r"(d|p|dp)?wee_|xsmall_", 4), (r"d?little_", 5), (r"small_", 6), (r"mediumd?_", 8),
    (r"betwixt_", 10), (r"base_patch16_plus_", 14), (r"base_", 12), (r"so150m2_", 13), (r"so150m_", 14),
    (r"(large|huge|so400m|giant|giantopt|gigantic|intern300m)_", 16), (r"7b_", 32),
)  # fmt: skip


def timm_heads(architecture: str) -> int | None:
    """Number of heads of a timm architecture; None for an unknown name."""
    return next((heads for pattern, heads in _TIMM_HEADS if re.match(f"vit_{pattern}", architecture)), None)


def stated(config: Mapping[str, Any], width: int, gated: bool) -> list[Statement]:
    """Statements of config.json about a backbone of this width, the strongest first.

    Raises:
        CheckpointError: A value is not a positive number.
        UnsupportedError: config.json states another activation.
    """
    found: list[Statement] = []
    if isinstance(arguments := config.get("model_args"), Mapping):
        _refuse_activation(arguments.get("act_layer"), gated, "silu" if gated else "gelu")
        found.append((_numbers(arguments), "model_args in config.json"))
    for where, section in _sections(config):
        if section.get("hidden_size", width) != width:
            continue
        kind = str(section.get("model_type"))
        _refuse_hf_activation(section, kind, gated)
        fields = _numbers(section)
        if "norm_eps" not in fields and kind in HF_EPS:
            fields["norm_eps"] = HF_EPS[kind]
        rope = section.get("rope_parameters")
        theta = section.get("rope_theta", rope.get("rope_theta") if isinstance(rope, Mapping) else None)
        if kind == "dinov3_vit" and theta is not None:
            fields["rope_base"] = _positive("rope_theta", theta, (int, float))
        found.append((fields, where))
    if (heads := timm_heads(str(config.get("architecture")))) is not None:
        name = str(config["architecture"])
        eps = 1e-5 if re.search("dinov3|lingbot", name) else 1e-6
        usual = {"num_heads": heads, "norm_eps": eps}
        said = found[0][0] if isinstance(arguments, Mapping) else {}  # model_args override the architecture
        found.append(({k: v for k, v in usual.items() if k not in said}, f"timm's architecture {name}"))
    return [(fields, where) for fields, where in found if fields]


def _sections(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """config.json itself, and its sections about the vision tower of a larger model."""
    inner = [(f"{name} in config.json", config[name]) for name in _SECTIONS if isinstance(config.get(name), Mapping)]
    return [*inner, ("config.json", config)]


def _numbers(section: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for ours, names, kind in (("num_heads", _HEADS, int), ("norm_eps", _EPS, (int, float))):
        name = next((name for name in names if section.get(name) is not None), None)
        if name is not None:
            fields[ours] = _positive(name, section[name], kind)
    return fields


def _refuse_hf_activation(section: Mapping[str, Any], kind: str, gated: bool) -> None:
    activation = section.get("hidden_act")
    if kind == "dinov3_vit":  # the gate uses the stated activation, and the class's default is gelu
        _refuse_activation(activation or "gelu", gated, "silu" if gated else "gelu")
    elif not gated:
        _refuse_activation(activation, gated, "gelu")
    elif kind not in HF_EPS and activation not in (None, "gelu"):  # DINOv2's gate is always SiLU
        _refuse_activation(activation, gated, "silu")


def _refuse_activation(stated: Any, gated: bool, ours: str) -> None:
    name = str(stated).rpartition(".")[2].lower().replace("swish", "silu")
    if stated is not None and name != ours:
        kind = "gated MLPs of DINO models use 'silu'" if gated else "DINO models use the exact 'gelu'"
        raise UnsupportedError(f"config.json asks for the activation {reprlib.repr(stated)}; {kind}")


def _positive(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is a number of this kind above 0 that fits a float.  Raises: CheckpointError."""
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= _LARGEST:
        raise CheckpointError(f"config.json gives {name} as {reprlib.repr(value)}, which should be a number above 0")
    return value
