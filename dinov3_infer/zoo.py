"""All named models: architecture, location of the weights, preprocessing and licence.

Parameter counts, hub ids and file hashes are from the model cards of facebookresearch/dinov3 at 6876159 and dinov2 at
b8931f7, from facebookresearch/dino, and from timm 1.0.31.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

from .errors import InputError, ModelNotFoundError, UnsupportedError
from .images.preprocess import Preprocess
from .model.convnext import ConvNeXtConfig
from .model.vit import ViTConfig

__all__ = [
    "ARCHITECTURES",
    "CORRECTIONS",
    "MODELS",
    "OWN",
    "Config",
    "ModelInfo",
    "find",
    "find_architecture",
    "list_models",
    "preprocess_of",
    "row_of_repository",
    "timm_model",
]

Config = ViTConfig | ConvNeXtConfig
Family = Literal["dinov3", "dinov2", "dino", "lingbot", "eupe"]
Style = Literal["meta", "hf", "timm"]

_V2: dict[str, Any] = dict(
    patch_size=14, num_registers=0, position_grid=37, position_resize="offset", key_bias=True, norm_eps=1e-6
)
_V2_REG: dict[str, Any] = _V2 | dict(num_registers=4, position_resize="antialias")
_V1: dict[str, Any] = dict(
    num_registers=0, position_resize="offset", key_bias=True, norm_eps=1e-6, layerscale=False, mask_token=False
)
_V1_16: dict[str, Any] = _V1 | dict(patch_size=16, position_grid=14)
_V1_8: dict[str, Any] = _V1 | dict(patch_size=8, position_grid=28)

# fmt: off
#                                 width depth heads  ffn
ARCHITECTURES: dict[str, Config] = {
    "dinov3_vits16":      ViTConfig( 384, 12,  6, 1536),
    "dinov3_vits16plus":  ViTConfig( 384, 12,  6, 1536, gated=True),
    "dinov3_vitb16":      ViTConfig( 768, 12, 12, 3072),
    "dinov3_vitl16":      ViTConfig(1024, 24, 16, 4096),
    "dinov3_vith16plus":  ViTConfig(1280, 32, 20, 5120, gated=True),
    "dinov3_vit7b16":     ViTConfig(4096, 40, 32, 8192, gated=True, qkv_bias=False),
    "dinov2_vits14":      ViTConfig( 384, 12,  6, 1536, **_V2),
    "dinov2_vitb14":      ViTConfig( 768, 12, 12, 3072, **_V2),
    "dinov2_vitl14":      ViTConfig(1024, 24, 16, 4096, **_V2),
    "dinov2_vitg14":      ViTConfig(1536, 40, 24, 4096, gated=True, **_V2),
    "dinov2_vits14_reg":  ViTConfig( 384, 12,  6, 1536, **_V2_REG),
    "dinov2_vitb14_reg":  ViTConfig( 768, 12, 12, 3072, **_V2_REG),
    "dinov2_vitl14_reg":  ViTConfig(1024, 24, 16, 4096, **_V2_REG),
    "dinov2_vitg14_reg":  ViTConfig(1536, 40, 24, 4096, gated=True, **_V2_REG),
    "dino_vits16":        ViTConfig( 384, 12,  6, 1536, **_V1_16),
    "dino_vits8":         ViTConfig( 384, 12,  6, 1536, **_V1_8),
    "dino_vitb16":        ViTConfig( 768, 12, 12, 3072, **_V1_16),
    "dino_vitb8":         ViTConfig( 768, 12, 12, 3072, **_V1_8),
    "lingbot_vits16":     ViTConfig( 384, 12,  6, 1536),
    "lingbot_vitb16":     ViTConfig( 768, 12, 12, 3072),
    "lingbot_vitl16":     ViTConfig(1024, 24, 16, 4096),
    "lingbot_vitg16":     ViTConfig(1536, 40, 24, 4096, gated=True, qkv_bias=False),
    "eupe_vitt16":        ViTConfig( 192, 12,  3,  768),
    "eupe_vits16":        ViTConfig( 384, 12,  6, 1536),
    "eupe_vitb16":        ViTConfig( 768, 12, 12, 3072),
    "nano":               ViTConfig( 192,  4,  3,  768),
    #                                        blocks         widths of the stages
    "dinov3_convnext_tiny":      ConvNeXtConfig((3, 3,  9, 3), ( 96, 192, 384,  768)),
    "dinov3_convnext_small":     ConvNeXtConfig((3, 3, 27, 3), ( 96, 192, 384,  768)),
    "dinov3_convnext_base":      ConvNeXtConfig((3, 3, 27, 3), (128, 256, 512, 1024)),
    "dinov3_convnext_large":     ConvNeXtConfig((3, 3, 27, 3), (192, 384, 768, 1536)),
}
# fmt: on

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SAT493M = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
_APACHE, _DINOV3, _FAIR = "Apache-2.0", "DINOv3 License", "FAIR Noncommercial Research License"
OWN = "the author's choice"  # licence of weights that were trained from scratch


@dataclass(frozen=True)
class ModelInfo:
    """One released model: an architecture and its weights."""

    name: str
    architecture: str  # a key of ARCHITECTURES
    family: Family
    licence: str  # of the weights
    hub_id: str | None = None  # the owner's repository
    timm_id: str | None = None  # timm's repository, the same weights under the same licence
    meta_file: str | None = None  # stem of the owner's file; 8 hex digits after its last dash begin its SHA-256
    mean: tuple[float, float, float] = _IMAGENET[0]
    std: tuple[float, float, float] = _IMAGENET[1]
    gated: bool = False  # the owner's repository requires accepting the licence
    fingerprint: str | None = None  # of the weights, if known, see `fingerprint`
    derived: bool = False  # True for weights that were trained further from these

    @property
    def title(self) -> str:
        """The name, or "derived from" and the name."""
        return f"derived from {self.name}" if self.derived else self.name

    @property
    def config(self) -> Config:
        """The network's config."""
        return ARCHITECTURES[self.architecture]


def _dinov3(name: str, timm: str, file_hash: str, dataset: str = "lvd1689m") -> ModelInfo:
    mean, std = _SAT493M if dataset == "sat493m" else _IMAGENET
    return ModelInfo(
        name if dataset == "lvd1689m" else f"{name}_{dataset}", name, "dinov3", _DINOV3,
        hub_id=f"facebook/{name.replace('_', '-')}-pretrain-{dataset}", timm_id=f"timm/{timm}_patch16_dinov3.{dataset}",
        meta_file=f"{name}_pretrain_{dataset}-{file_hash}", mean=mean, std=std, gated=True,
    )  # fmt: skip


def _dinov2(name: str, size: str) -> ModelInfo:
    registers = name.endswith("_reg")
    return ModelInfo(
        name, name, "dinov2", _APACHE,
        hub_id=f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        timm_id=f"timm/vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
        meta_file=f"{name}4_pretrain" if registers else f"{name}_pretrain",
    )  # fmt: skip


def _dino(name: str, size: str, meta_name: str) -> ModelInfo:
    patch = name.rpartition("vit")[2][1:]
    return ModelInfo(
        name, name, "dino", _APACHE,
        hub_id=f"facebook/{name.replace('_', '-')}", timm_id=f"timm/vit_{size}_patch{patch}_224.dino",
        meta_file=f"dino_{meta_name}{patch}_pretrain",
    )  # fmt: skip


def _lingbot(name: str, size: str) -> ModelInfo:
    return ModelInfo(
        name, name, "lingbot", _APACHE,
        hub_id=f"robbyant/lingbot-vision-vit-{size}", timm_id=f"belfner/vit_{size}_patch16_lingbot.robbyant",
    )  # fmt: skip


def _eupe(letter: str, size: str) -> ModelInfo:
    # EUPE at f6cdf04: the network of DINOv3, its keys without a bias in effect
    name = f"eupe_vit{letter.lower()}16"
    return ModelInfo(
        name, name, "eupe", _FAIR, hub_id=f"facebook/EUPE-ViT-{letter}", meta_file=f"EUPE-ViT-{letter}",
        timm_id=f"timm/vit_{size}_patch16_dinov3_qkvb.eupe_lvd1689m",
    )  # fmt: skip


def _convnext(size: str, file_hash: str) -> ModelInfo:
    name = f"dinov3_convnext_{size}"
    return ModelInfo(
        name, name, "dinov3", _DINOV3,
        hub_id=f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m", timm_id=f"timm/convnext_{size}.dinov3_lvd1689m",
        meta_file=f"{name}_pretrain_lvd1689m-{file_hash}", gated=True,
    )  # fmt: skip


def _eupe_convnext(size: str) -> ModelInfo:
    timm_id = f"timm/convnext_{size}.eupe_lvd1689m"
    return ModelInfo(f"eupe_convnext_{size}", f"dinov3_convnext_{size}", "eupe", _FAIR, timm_id=timm_id)


_ROWS = (
    _dinov3("dinov3_vits16", "vit_small", "08c60483"),
    _dinov3("dinov3_vits16plus", "vit_small_plus", "4057cbaa"),
    _dinov3("dinov3_vitb16", "vit_base", "73cec8be"),
    _dinov3("dinov3_vitl16", "vit_large", "8aa4cbdd"),
    _dinov3("dinov3_vith16plus", "vit_huge_plus", "7c1da9a5"),
    _dinov3("dinov3_vit7b16", "vit_7b", "a955f4ea"),
    _dinov3("dinov3_vitl16", "vit_large", "eadcf0ff", "sat493m"),
    _dinov3("dinov3_vit7b16", "vit_7b", "a6675841", "sat493m"),
    _convnext("tiny", "21b726bb"),
    _convnext("small", "296db49d"),
    _convnext("base", "801f2ba9"),
    _convnext("large", "61fa432d"),
    *(_dinov2(f"dinov2_vit{s[0]}14{reg}", s) for reg in ("", "_reg") for s in ("small", "base", "large", "giant")),
    _dino("dino_vits16", "small", "deitsmall"),
    _dino("dino_vits8", "small", "deitsmall"),
    _dino("dino_vitb16", "base", "vitbase"),
    _dino("dino_vitb8", "base", "vitbase"),
    *(_lingbot(f"lingbot_vit{s[0]}16", s) for s in ("small", "base", "large", "giant")),
    *(_eupe(size[0].upper(), size) for size in ("tiny", "small", "base")),
    *(_eupe_convnext(size) for size in ("tiny", "small", "base")),
    ModelInfo(
        "nano", "nano", "dinov3", _APACHE,
        fingerprint="d62b34cd8ee67052df3e4ce8f13347bcb8e5812f1511e6912d59a7a058c9d83a",
    ),
)  # fmt: skip
MODELS: dict[str, ModelInfo] = {row.name: row for row in _ROWS}

_LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
# Repositories whose config.json states a wrong mean and std: hub id -> those of the authors' training, and the source.
CORRECTIONS: dict[str, tuple[Any, Any, str]] = {
    "Wangyh/mSTAR": (*_IMAGENET, "the model's card, and slide2vec 7.1.4, mstar.py"),
    **{
        f"1aurent/vit_small_patch{patch}_224.lunit_dino": (
            *_LUNIT, "the README of lunit-io/benchmark-ssl-pathology, and slide2vec 7.1.4, lunit.py"
        )
        for patch in (8, 16)
    },
}  # fmt: skip

# Preprocessing that each source documents for its models; `None` is our default.
_PREPROCESSING: dict[tuple[str, Style | None], dict[str, Any]] = {
    ("dinov3", None): dict(size=256),
    ("dinov3", "meta"): dict(size=256),
    ("dinov3", "hf"): dict(size=224, engine="float"),
    ("dinov3", "timm"): dict(size=256, fit="crop", filter="bicubic", engine="pil"),
    ("dinov2", None): dict(size=224),
    ("dinov2", "meta"): dict(size=224, fit="crop", resize_to=256, filter="bicubic", engine="pil"),
    ("dinov2", "hf"): dict(size=224, fit="crop", resize_to=256, filter="bicubic", engine="pil", crop_rounds="down"),
    ("dinov2", "timm"): dict(size=518, fit="crop", filter="bicubic", engine="pil"),
    ("dino", None): dict(size=224),
    ("dino", "meta"): dict(size=224, fit="crop", resize_to=256, filter="bicubic", engine="pil"),
    ("dino", "hf"): dict(size=224, engine="pil"),
    ("dino", "timm"): dict(size=224, fit="crop", resize_to=248, filter="bicubic", engine="pil"),
    ("lingbot", None): dict(size=512),
    ("lingbot", "timm"): dict(size=512, engine="pil"),
    ("dinov3_convnext", "timm"): dict(size=224, fit="crop", filter="bicubic", engine="pil"),
    ("eupe", None): dict(size=256),
    ("eupe", "meta"): dict(size=256),
    ("eupe", "timm"): dict(size=256, fit="crop", filter="bicubic", engine="pil"),
}

_ELSEWHERE = (  # (pattern of a name, reason)
    (r"convnext", "the ConvNeXts here are dinov3_convnext_{tiny,small,base,large} and eupe_convnext_{tiny,small,base}"),
    (r"_(lc|dd|ld|chmv2)$|linear|classifier", "it is a head on a backbone; load_head() loads the released heads"),
    (r"vitl16plus", "dinov3_vitl16plus is in the reference code, but its weights were never released"),
    (r"resnet50|xcit", "of DINO only the vision transformers are here, dino_vit{s,b}{16,8}"),
)  # fmt: skip


def list_models() -> list[str]:
    """Names of all models, in the order of the table.

    Example:
        >>> list_models()[:2]
        ['dinov3_vits16', 'dinov3_vits16plus']
    """
    return list(MODELS)


def find(name: str) -> ModelInfo:
    """Find a model by name, by bare DINOv3 name (`vitb16`), by hub id or by timm id.

    Raises:
        ModelNotFoundError: No model has that name; the message has the closest names.
        UnsupportedError: The model exists, but not in this package.
    """
    bare = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    short = "" if name.startswith("convnext") else f"dinov3_{name}"  # timm's convnext_tiny is a supervised model
    info = MODELS.get(name) or MODELS.get(short) or row_of_repository(bare)
    info = info or _BY_ID.get(bare.replace("_dinov3_qkvb", "_dinov3").removeprefix("timm/"))
    if info is not None:
        return info
    well_known = "/" not in name or name.startswith(("facebook/", "timm/"))  # other owners may use any name
    for pattern, reason in _ELSEWHERE if well_known else ():
        if re.search(pattern, name, re.IGNORECASE):
            raise UnsupportedError(f"{name!r} is not a model of this package: {reason}")
    known = list(dict.fromkeys(short for n in MODELS for short in (n, n.removeprefix("dinov3_"))))
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    raise ModelNotFoundError(
        f"unknown model {name!r}: {hint}See list_models(), or give a hub id 'org/name', a directory or a weights file"
    )


def timm_model(row: ModelInfo) -> str:
    """timm's name of a model, "architecture.tag"."""
    return (row.timm_id or "").rpartition("/")[2]


def _ids(row: ModelInfo) -> list[str]:
    """All other names of a row.  timm's name without its tag is left out if it means a supervised model."""
    supervised = row.family == "dino" or isinstance(row.config, ConvNeXtConfig)
    untagged = "" if supervised else timm_model(row).split(".")[0].replace("_dinov3_qkvb", "_dinov3")
    return [name for name in (row.hub_id, row.timm_id, timm_model(row), untagged) if name]


_BY_ID = {name: row for row in reversed(_ROWS) for name in _ids(row)}  # if two rows share a name, the first is used


def row_of_repository(repository: str) -> ModelInfo | None:
    """The row of a hub id (the owner's or timm's), or of a timm model with its tag; None for others."""
    return _BY_ID.get(repository) or _BY_ID.get(repository.replace("_dinov3_qkvb", "_dinov3"))


def find_architecture(timm_architecture: str) -> ModelInfo | None:
    """The row of a timm architecture name without tag, with or without biases; None for others."""
    plain = timm_architecture.replace("_dinov3_qkvb", "_dinov3")
    return next(
        (r for r in MODELS.values() if timm_model(r).split(".")[0].replace("_dinov3_qkvb", "_dinov3") == plain), None
    )


def preprocess_of(info: ModelInfo, style: Style | None = None) -> Preprocess:
    """The transform of a model.

    Args:
        info: The row of the model.
        style: "meta", "hf" or "timm" for exactly the transform of Meta's code, transformers or timm; None for our own
            default.

    Raises:
        InputError: That library has no transform for this model.
    """
    special = info.name.rpartition("_")[0], style
    options = _PREPROCESSING.get(special, _PREPROCESSING.get((info.family, style)))
    if options is None:
        known = [repr(s) for family, s in _PREPROCESSING if family == info.family and s]
        raise InputError(
            f"preprocessing={style!r} does not exist for {info.name}; give {', '.join(known)}, or None for the default"
        )
    return Preprocess(info.mean, info.std, info.config.patch_size, **options)
