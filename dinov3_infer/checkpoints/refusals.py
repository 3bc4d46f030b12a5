"""Refuses models that resemble DINO but differ, by name and with the reason, before anything is computed.

Sources: transformers 5.24 and timm 1.0.31, and the model cards of models that are in neither.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..errors import UnsupportedError

__all__ = ["refuse_config", "refuse_id", "refuse_tensors"]


class _Neighbour(NamedTuple):
    name: str
    ids: str  # pattern of a hub id, a timm name or the model type of a config.json, in lower case
    why: str


_NEIGHBOURS = (
    _Neighbour("C-RADIO", r"(\b|_)(c-)?radio(\b|_|v\d)", "it has several class tokens, crops its positions and ends "
               "without a norm"),
    _Neighbour("Sapiens2", r"(\b|_)sapiens", "its blocks share keys among queries and normalise both"),
    _Neighbour("RudolfV-2", r"rudolf-?v", "its blocks normalise queries and keys"),
    _Neighbour("GenBio-PathFM", r"(genbio|pathfm)", "it sees each colour by itself and joins three passes"),
    _Neighbour("Pixio", r"(\b|_)pixio", "it has eight class tokens"),
    _Neighbour("I-JEPA", r"(\b|_)i-?jepa", "it has no class token"),
    _Neighbour("Perception Encoder (PE)", r"(^|/|_)pe[-_](core|spatial|lang|av|audio|video)",
               "it has a norm before its blocks and rotates queries and keys in another way"),
    _Neighbour("SigLIP", r"(\b|_)siglip", "it has no class token and pools by attention"),
    _Neighbour("EVA", r"(\b|_)eva(\b|_|02|-?clip|giant)", "its attention and its gates have norms and rotations of "
               "another kind"),
    _Neighbour("RoPE-ViT", r"^vit_\w+_rope(_|$)|rope-?vit", "it rotates queries and keys in another way"),
    _Neighbour("DEIMv2", r"(\b|_)deim", "it is a detector; the DINOv3 inside it can be loaded by its own name"),
    _Neighbour("EoMT", r"(\b|_)eomt", "it is a segmenter whose queries run through its last blocks"),
)  # fmt: skip

# patterns of tensor names that no supported network has, and what they mean
_SIGNS = (
    (r"(^|\.)([qk]_norm|query_norm|key_norm|[qk]_layernorm|layernorm_[qk])\.", "it normalises queries and keys"),
    (r"(^|\.)(norm_pre|ln_pre|pre_layrnorm)\.", "it has a norm before its blocks"),
    (r"(^|\.)(attn_pool|attnpool|attention_pool)\.", "it pools by attention"),
    (r"(^|\.)rope\.freqs", "it learned how to rotate queries and keys"),
    (r"blocks\.\d+\.(attns|ffns)\.", "its blocks run side by side"),
    (r"patch_embed\.backbone\.", "a convolutional network makes its patches"),
    (r"relative_position_bias|rel_pos", "its attention has relative positions"),
    (r"(^|\.)(inner_attn_ln|ffn_ln|mlp\.norm|attn\.norm)\.", "it has norms inside its attention or its MLP"),
)
_ENDS = "which is not supported; load it with the library that its model card names"


def refuse_id(name: str) -> None:
    """Raises UnsupportedError for a hub id or timm name of a model that is known to differ.

    If the name also contains DINO, only the detector and the segmenter are refused, since the others are then unknown.
    """
    _refuse(name, name)


def refuse_config(config: Mapping[str, Any], path: str) -> None:
    """Raises UnsupportedError for a config.json of transformers or timm of a model that is known to differ."""
    timm = config.get("pretrained_cfg")
    stated = [config.get("model_type"), config.get("architecture"), isinstance(timm, dict) and timm.get("architecture")]
    for text in stated:
        if isinstance(text, str):
            _refuse(text, path)


def refuse_tensors(names: Collection[str], class_token: tuple[int, ...] | None, path: str) -> None:
    """Raises UnsupportedError if tensor names, or the shape of the class token, show another network."""
    for pattern, why in _SIGNS:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            raise UnsupportedError(f"'{path}' is no DINO: {why} ('{found}'), {_ENDS}")
    if class_token is not None and len(class_token) == 3 and class_token[1] > 1:
        raise UnsupportedError(f"'{path}' is no DINO: it has {class_token[1]} class tokens, as C-RADIO and Pixio have")


def _refuse(text: str, said: str) -> None:
    text = text.lower()
    found = next((one for one in _NEIGHBOURS if re.search(one.ids, text)), None)
    if found is not None and ("dino" not in text or found.name in ("DEIMv2", "EoMT")):
        raise UnsupportedError(f"'{said}' is {found.name}: {found.why}, {_ENDS}")
