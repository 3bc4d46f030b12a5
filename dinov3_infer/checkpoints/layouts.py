"""One table per checkpoint layout: our parameter name -> its place in the file.

Loading reads the tables forwards, saving backwards.  `#` stands for a block number, and a name after `?` may be absent.
A plain string is copied, a `Row` describes anything else.

Sources: dinov3 at 6876159, dinov2 at b8931f7, dino main; transformers 5.23.0; timm 1.0.31.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import InputError
from ..model.convnext import ConvNeXtConfig
from ..zoo import Config

__all__ = ["LAYOUTS", "OURS", "Layout", "LayoutName", "Parts", "Row", "layout_for"]

LayoutName = Literal["hf", "meta", "timm"]
Form = Literal["copied", "joined", "masked", "nested", "folded", "cut", "placed", "twice"]

ZEROS = "?"  # a part of zeros that no file stores; its name is ""


@dataclass(frozen=True)
class Row:
    """How a file stores one of our tensors.

    "joined": parts, concatenated along dimension 0; absent parts are zeros.
    "masked": a tensor times a mask that the file may hold beside it.
    "nested": the tensor with an additional leading dimension.
    "twice": the tensor under two names.
    "folded": positions without the class token's, which the file has added to the class token.
    "cut": positions including those of the registers, which are dropped here, since they are
    "placed": registers, plus their rows of the position table (the second name).
    """

    form: Form
    names: tuple[str, ...]


def _both(ours: str, theirs: str | Callable[[str], Row] | None = None) -> dict[str, str | Row]:
    """Rows for the weight and the bias of a module."""
    make = (lambda kind: f"{theirs or ours}.{kind}") if not callable(theirs) else theirs
    return {f"{ours}.{kind}": make(kind) for kind in ("weight", "bias")}


def _joined(*names: str) -> Callable[[str], Row]:
    return lambda kind: Row("joined", tuple(f"{name}.{kind}" for name in names))


def _qkv(query: str, key: str, value: str, *, key_bias: str = "") -> dict[str, str | Row]:
    """Three linears; `key_bias="?"` means that the key's bias may be absent."""
    return {
        "blocks.#.attn.qkv.weight": Row("joined", (f"{query}.weight", f"{key}.weight", f"{value}.weight")),
        "blocks.#.attn.qkv.bias": Row("joined", (f"{query}.bias", f"{key_bias}{key}.bias", f"{value}.bias")),
    }


@dataclass(frozen=True)
class Parts:
    """The place of one of our tensors in a file."""

    form: Form
    names: tuple[str, ...]  # in the file
    optional: frozenset[str]  # names that may be absent


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout."""

    name: LayoutName
    family: str  # "dinov3", "dinov2", "dino" or "convnext"
    has: tuple[str, ...]  # patterns that all must match a name, without wrapper prefixes ...
    lacks: tuple[str, ...]  # ... and patterns that must match none
    rows: dict[str, str | Row]
    unused: Mapping[str, str] = field(default_factory=dict)  # pattern of a name in the file -> why it is not loaded
    spellings: tuple[tuple[str, str], ...] = ()  # other spellings of the names: pattern, replacement

    @property
    def label(self) -> str:
        """Name and family."""
        return f"{self.name} ({self.family})"

    def depth(self, names: Iterable[str]) -> int:
        """Number of blocks in a file with these names; of the longest stage for a ConvNeXt."""
        numbered = {row.partition("#")[0] for row in self.rows.values() if isinstance(row, str) and "#" in row}
        before = "|".join(map(re.escape, sorted(numbered)))
        found = (re.match(rf"(?:{before})(\d{{1,3}})\.", name) for name in names)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def parts(self, depth: int) -> dict[str, Parts]:
        """Our tensor names for this depth -> their `Parts`; a tensor that the layout cannot store has no entry."""
        return {
            ours.replace("#", str(number)): _parts(row, str(number))
            for ours, row in self.rows.items()
            for number in range(depth if "#" in ours else 1)
        }


def _parts(row: str | Row, number: str) -> Parts:
    row = Row("copied", (row,)) if isinstance(row, str) else row
    names = tuple(name.removeprefix("?").replace("#", number) for name in row.names)
    optional = (name for name, written in zip(names, row.names, strict=True) if written.startswith("?"))
    return Parts(row.form, names, frozenset(optional))


_PLAIN: dict[str, str | Row] = {  # names that Meta and timm share; ours are Meta's
    "cls_token": "cls_token",
    "patch_embed.proj.weight": "patch_embed.proj.weight",
    "patch_embed.proj.bias": "patch_embed.proj.bias",
    **_both("blocks.#.norm1"),
    **_both("blocks.#.attn.qkv"),
    **_both("blocks.#.attn.proj"),
    **_both("blocks.#.norm2"),
    **_both("blocks.#.mlp.fc1"),
    **_both("blocks.#.mlp.fc2"),
    **_both("norm"),
}
_LS: dict[str, str | Row] = {f"blocks.#.ls{i}.gamma": f"blocks.#.ls{i}.gamma" for i in (1, 2)}
_HF_LS: dict[str, str] = {f"blocks.#.ls{i}.gamma": f"layer.#.layer_scale{i}.lambda1" for i in (1, 2)}
_CHUNKS = ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)  # a training run with block_chunks > 0
_TIPS = ((r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."))  # of TIPSv2, as transformers writes it
_TIMM_HEADS = {r"(head|fc_norm)\..*": "a classifier, and the norm of what it pools"}
_HEADS = {r"(dino_|ibot_)?head\..*": "a head, not the backbone"}

META_V3 = Layout(
    "meta", "dinov3",
    has=(r"patch_embed\.proj\.weight", r"(rope_embed\.periods|storage_tokens)"), lacks=(),
    rows=_PLAIN | _LS | {
        "register_tokens": "storage_tokens",
        "mask_token": "mask_token",
        "rope_periods": "rope_embed.periods",
        "blocks.#.attn.qkv.bias": Row("masked", ("blocks.#.attn.qkv.bias", "?blocks.#.attn.qkv.bias_mask")),
        **_both("blocks.#.mlp.gate_up", _joined("blocks.#.mlp.w1", "blocks.#.mlp.w2")),
        **_both("blocks.#.mlp.down", "blocks.#.mlp.w3"),
        **_both("cls_norm"),
        **_both("local_cls_norm"),
    },
    unused=_HEADS, spellings=_CHUNKS,
)  # fmt: skip

META_V2 = Layout(
    "meta", "dinov2",
    has=(r"patch_embed\.proj\.weight", r"pos_embed", r"mask_token"), lacks=(r"reg_token",),
    rows=_PLAIN | _LS | {
        "pos_embed": "pos_embed",
        "register_tokens": "register_tokens",
        "mask_token": "mask_token",
        **_both("blocks.#.mlp.gate_up", "blocks.#.mlp.w12"),
        **_both("blocks.#.mlp.down", "blocks.#.mlp.w3"),
    },
    unused=_HEADS, spellings=(*_CHUNKS, *_TIPS),
)  # fmt: skip

META_V1 = Layout(
    "meta", "dino",
    has=(r"patch_embed\.proj\.weight", r"pos_embed"), lacks=(r"mask_token", r"reg_token", r"blocks\.0\.ls1\.gamma"),
    rows=_PLAIN | {"pos_embed": "pos_embed"},
    unused=_HEADS,
)  # fmt: skip

HF_V3 = Layout(
    "hf", "dinov3",
    has=(r"embeddings\.patch_embeddings\.weight",), lacks=(),
    rows={
        "cls_token": "embeddings.cls_token",
        "register_tokens": "embeddings.register_tokens",
        "mask_token": Row("nested", ("embeddings.mask_token",)),
        **_both("patch_embed.proj", "embeddings.patch_embeddings"),
        **_both("blocks.#.norm1", "layer.#.norm1"),
        **_qkv(*(f"layer.#.attention.{part}_proj" for part in "qkv"), key_bias="?"),
        **_both("blocks.#.attn.proj", "layer.#.attention.o_proj"),
        **_HF_LS,
        **_both("blocks.#.norm2", "layer.#.norm2"),
        **_both("blocks.#.mlp.gate_up", _joined("layer.#.mlp.gate_proj", "layer.#.mlp.up_proj")),
        **_both("blocks.#.mlp.down", "layer.#.mlp.down_proj"),
        **_both("blocks.#.mlp.fc1", "layer.#.mlp.up_proj"),
        **_both("blocks.#.mlp.fc2", "layer.#.mlp.down_proj"),
        **_both("norm"),
    },
    spellings=((r"^model\.layer\.", "layer."),),
)  # fmt: skip

HF_V2 = Layout(
    "hf", "dinov2",
    has=(r"embeddings\.patch_embeddings\.projection\.weight", r"encoder\.layer\.0\.norm1\.weight"), lacks=(),
    rows={
        "cls_token": "embeddings.cls_token",
        "register_tokens": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        **_both("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        **_both("blocks.#.norm1", "encoder.layer.#.norm1"),
        **_qkv(*(f"encoder.layer.#.attention.attention.{part}" for part in ("query", "key", "value"))),
        **_both("blocks.#.attn.proj", "encoder.layer.#.attention.output.dense"),
        **{ours: f"encoder.{theirs}" for ours, theirs in _HF_LS.items()},
        **_both("blocks.#.norm2", "encoder.layer.#.norm2"),
        **_both("blocks.#.mlp.gate_up", "encoder.layer.#.mlp.weights_in"),
        **_both("blocks.#.mlp.down", "encoder.layer.#.mlp.weights_out"),
        **_both("blocks.#.mlp.fc1", "encoder.layer.#.mlp.fc1"),
        **_both("blocks.#.mlp.fc2", "encoder.layer.#.mlp.fc2"),
        **_both("norm", "layernorm"),
    },
    spellings=(
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    ),
)  # fmt: skip

HF_V2_GATED_LIVE = replace(  # the giant as transformers 5 holds it in memory: its files join gate and up
    HF_V2,
    has=(*HF_V2.has, r"encoder\.layer\.0\.mlp\.gate_proj\.weight"),
    rows=HF_V2.rows
    | _both("blocks.#.mlp.gate_up", _joined("encoder.layer.#.mlp.gate_proj", "encoder.layer.#.mlp.up_proj")),
)

HF_V1 = Layout(
    "hf", "dino",
    has=(r"embeddings\.patch_embeddings\.projection\.weight", r"(encoder\.layer|layers)\.0\.layernorm_before\.weight"),
    lacks=(),
    rows={
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        **_both("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        **_both("blocks.#.norm1", "encoder.layer.#.layernorm_before"),
        **_qkv(*(f"encoder.layer.#.attention.attention.{part}" for part in ("query", "key", "value"))),
        **_both("blocks.#.attn.proj", "encoder.layer.#.attention.output.dense"),
        **_both("blocks.#.norm2", "encoder.layer.#.layernorm_after"),
        **_both("blocks.#.mlp.fc1", "encoder.layer.#.intermediate.dense"),
        **_both("blocks.#.mlp.fc2", "encoder.layer.#.output.dense"),
        **_both("norm", "layernorm"),
    },
    unused={r"pooler\..*": "transformers' pooler, which no DINO was trained with"},
    spellings=(
        (r"^layers\.", "encoder.layer."),
        *HF_V2.spellings[:4],
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)  # fmt: skip

TIMM_V3 = Layout(
    "timm", "dinov3",
    has=(r"patch_embed\.proj\.weight", r"blocks\.0\.gamma_1"), lacks=(r"pos_embed",),
    rows=_PLAIN | {
        "register_tokens": "reg_token",
        "blocks.#.attn.qkv.bias": Row("joined", ("blocks.#.attn.q_bias", ZEROS, "blocks.#.attn.v_bias")),
        **{f"blocks.#.ls{i}.gamma": f"blocks.#.gamma_{i}" for i in (1, 2)},
        **_both("blocks.#.mlp.gate_up", _joined("blocks.#.mlp.fc1_g", "blocks.#.mlp.fc1_x")),
        **_both("blocks.#.mlp.down", "blocks.#.mlp.fc2"),
    },
    unused={r"blocks\.\d+\.attn\.k_bias": "timm's zero key bias"} | _TIMM_HEADS,
)  # fmt: skip

TIMM_V2 = Layout(
    "timm", "dinov2",
    has=(r"patch_embed\.proj\.weight", r"pos_embed", r"blocks\.0\.ls1\.gamma"), lacks=(r"mask_token",),
    rows=_PLAIN | _LS | {
        "pos_embed": "pos_embed",
        **_both("blocks.#.mlp.gate_up", "blocks.#.mlp.fc1"),
        **_both("blocks.#.mlp.down", "blocks.#.mlp.fc2"),
    },
    unused=_TIMM_HEADS,
)  # fmt: skip

TIMM_V2_REG = replace(
    TIMM_V2,
    has=(*TIMM_V2.has, r"reg_token"),
    rows=TIMM_V2.rows | {"register_tokens": "reg_token", "pos_embed": Row("folded", ("pos_embed",))},
)

TIMM_V1 = Layout("timm", "dino", has=META_V1.has, lacks=META_V1.lacks, rows=META_V1.rows, unused=_TIMM_HEADS)


def _convnext(down: str, block: str, parts: tuple[str, ...], stem: str | None = None) -> dict[str, str | Row]:
    """Rows of the four stages; `down` is the name of the two modules before stage S."""
    rows: dict[str, str | Row] = {}
    for stage in "0123":
        before = stem if stem is not None and stage == "0" else down.replace("S", stage)
        for number in (0, 1):
            rows |= _both(f"downsample_layers.{stage}.{number}", f"{before}.{number}")
        ours, theirs = f"stages.{stage}.#.", block.replace("S", stage)
        for part, name in zip(_CONV_PARTS, parts, strict=True):
            rows |= _both(ours + part, theirs + name)
        rows[f"{ours}gamma"] = f"{theirs}gamma"
    return rows


_CONV_PARTS = ("dwconv", "norm", "pwconv1", "pwconv2")

META_CONVNEXT = Layout(
    "meta", "convnext",
    has=(r"downsample_layers\.0\.0\.weight", r"stages\.0\.0\.dwconv\.weight"), lacks=(),
    rows=_convnext("downsample_layers.S", "stages.S.#.", _CONV_PARTS)
    | _both("norm", lambda kind: Row("twice", (f"norm.{kind}", f"?norms.3.{kind}"))),
    unused=_HEADS | {r"projectors\..*": "EUPE's projections to its teachers", r"norms\..*": "norms of those"},
)  # fmt: skip

_HF_PARTS = ("depthwise_conv", "layer_norm", "pointwise_conv1", "pointwise_conv2")
HF_CONVNEXT = Layout(
    "hf", "convnext", has=(r"(model\.)?stages\.0\.layers\.0\.depthwise_conv\.weight",), lacks=(),
    rows=_convnext("stages.S.downsample_layers", "stages.S.layers.#.", _HF_PARTS) | _both("norm", "layer_norm"),
    spellings=((r"^model\.stages\.", "stages."),),
)  # fmt: skip

TIMM_CONVNEXT = Layout(
    "timm", "convnext", has=(r"stem\.0\.weight", r"stages\.0\.blocks\.0\.conv_dw\.weight"), lacks=(),
    rows=_convnext("stages.S.downsample", "stages.S.blocks.#.", ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"), stem="stem")
    | _both("norm", "head.norm"),
    unused={r"head\.fc\..*": "a classifier"},
)  # fmt: skip

# The first match is used.  Meta's and timm's DINO v1 have the same names: only a config or `layout=` can tell.
LAYOUTS = (
    META_V3, META_V2, META_V1, HF_V3, HF_V2_GATED_LIVE, HF_V2, HF_V1, TIMM_V3, TIMM_V2_REG, TIMM_V2, TIMM_V1,
    META_CONVNEXT, HF_CONVNEXT, TIMM_CONVNEXT,
)  # fmt: skip

# The state_dict of a Backbone, which does not hold its config: loaded only if the caller names the model.
_OURS: dict[str, str | Row] = {
    **_PLAIN, **_LS, **{name: name for name in ("register_tokens", "mask_token", "rope_periods", "pos_embed")},
    **_both("blocks.#.mlp.gate_up"), **_both("blocks.#.mlp.down"), **_both("cls_norm"), **_both("local_cls_norm"),
}  # fmt: skip
OURS = tuple(
    Layout("meta", family, has=(has,), lacks=lacks, rows=_OURS, unused=_HEADS)
    for family, has, lacks in (
        ("dinov3", "rope_periods", ("rope_embed.periods",)),
        ("dinov2", r"blocks\.0\.mlp\.gate_up\.weight", ()),
    )
)


def layout_for(config: Config, name: LayoutName) -> Layout:
    """The layout `name` for this architecture.  Raises: InputError for an unknown name."""
    if isinstance(config, ConvNeXtConfig):
        family = "convnext"
        for_others: tuple[Layout, ...] = ()
    else:
        family = "dinov3" if config.position_grid is None else "dinov2" if config.layerscale else "dino"
        for_others = (HF_V2_GATED_LIVE, TIMM_V2 if config.num_registers else TIMM_V2_REG)
    for candidate in LAYOUTS:
        if (candidate.name, candidate.family) == (name, family) and candidate not in for_others:
            return candidate
    raise InputError(f"layout is one of 'hf', 'meta', 'timm'; got {name!r}")
