"""Models near DINO that are something else: refused by name, with the reason, before anything is computed.

Sources: transformers 5.24 and timm 1.0.31, where these models are, and the cards of those that are in neither.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..errors import UnsupportedError

__all__ = ["refuse_config", "refuse_id", "refuse_tensors"]


class _Neighbour(NamedTuple):
    name: str
    ids: str  # pattern in a hub id, a name of timm or the model type of a config.json, all in lower case
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
    _Neighbour("DEIMv2", r"(\b|_)deim", "it is a detector; the DINOv3 inside it can be loaded by its own name"),
    _Neighbour("EoMT", r"(\b|_)eomt", "it is a segmenter whose queries run through its last blocks"),
)  # fmt: skip

# names of tensors that no network here has, or has one of, and what they mean
_SIGNS = (
    (r"(^|\.)([qk]_norm|query_norm|key_norm|[qk]_layernorm|layernorm_[qk])\.", "it normalises queries and keys"),
    (r"(^|\.)(norm_pre|ln_pre|pre_layrnorm)\.", "it has a norm before its blocks"),
    (r"(^|\.)(attn_pool|attnpool|attention_pool)\.", "it pools by attention"),
    (r"relative_position_bias|rel_pos", "its attention has relative positions"),
    (r"(^|\.)(inner_attn_ln|ffn_ln|mlp\.norm|attn\.norm)\.", "it has norms inside its attention or its MLP"),
)
_ENDS = "and that is not here; timm or transformers have it"


def refuse_id(name: str) -> None:
    """Raises UnsupportedError for a hub id, or a name of timm, of a model that is known to be another.

    Of a name that also speaks of DINO only the detector and the segmenter: what the others do with it nobody knows.
    """
    _refuse(name, name)


def refuse_config(config: Mapping[str, Any], path: str) -> None:
    """Raises UnsupportedError for a config.json, of transformers or timm, of a model that is known to be another."""
    timm = config.get("pretrained_cfg")
    stated = [config.get("model_type"), config.get("architecture"), isinstance(timm, dict) and timm.get("architecture")]
    for text in stated:
        if isinstance(text, str):
            _refuse(text, path)


def refuse_tensors(names: Collection[str], class_token: tuple[int, ...] | None, path: str) -> None:
    """Raises UnsupportedError for what the names in a backbone, or its class token, show to be another network."""
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
