"""The table of models: sizes, names, licences and transforms equal the published ones."""

from dataclasses import replace

import pytest
import torch
from oracles import hf_shapes
from torch import nn

from dinov3_infer.errors import InputError, ModelNotFoundError, UnsupportedError
from dinov3_infer.model.vit import VisionTransformer, ViTConfig
from dinov3_infer.zoo import ARCHITECTURES, MODELS, ModelInfo, find, find_architecture, list_models, preprocess_of

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SATELLITE = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)

# Parameters of DINOv3: (those of Meta's modules, those of transformers').
PUBLISHED = {
    "dinov3_vits16": (21_601_152, 21_596_544),
    "dinov3_vits16plus": (28_697_472, 28_692_864),
    "dinov3_vitb16": (85_669_632, 85_660_416),
    "dinov3_vitl16": (303_154_176, 303_129_600),
    "dinov3_vitl16_sat493m": (303_156_224, 303_129_600),
    "dinov3_vith16plus": (840_633_600, 840_592_640),
    "dinov3_vit7b16": (6_716_043_264, 6_716_035_072),
    "dinov3_vit7b16_sat493m": (6_716_043_264, 6_716_035_072),
}
WITH_LOCAL_NORM = ("dinov3_vitl16_sat493m", "dinov3_vit7b16", "dinov3_vit7b16_sat493m")  # in Meta's files, for training
MILLIONS = {  # of transformers' modules, as published in millions
    "dinov2_vits14": 22.06, "dinov2_vitb14": 86.58, "dinov2_vitl14": 304.37, "dinov2_vitg14": 1136.48,
    "dino_vits16": 21.67, "dino_vits8": 21.67, "dino_vitb16": 85.80, "dino_vitb8": 85.81,
}  # fmt: skip
TIMM_MILLIONS = {  # of timm's DINOv3 without biases
    "dinov3_vits16": 21.59, "dinov3_vits16plus": 28.68, "dinov3_vitb16": 85.64, "dinov3_vitl16": 303.08,
    "dinov3_vith16plus": 840.51, "dinov3_vit7b16": 6716.03,
}  # fmt: skip
META_FILES = {
    "dinov3_vits16": "dinov3_vits16_pretrain_lvd1689m-08c60483",
    "dinov3_vits16plus": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa",
    "dinov3_vitb16": "dinov3_vitb16_pretrain_lvd1689m-73cec8be",
    "dinov3_vitl16": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd",
    "dinov3_vitl16_sat493m": "dinov3_vitl16_pretrain_sat493m-eadcf0ff",
    "dinov3_vith16plus": "dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5",
    "dinov3_vit7b16": "dinov3_vit7b16_pretrain_lvd1689m-a955f4ea",
    "dinov3_vit7b16_sat493m": "dinov3_vit7b16_pretrain_sat493m-a6675841",
    "dinov2_vitg14": "dinov2_vitg14_pretrain",
    "dinov2_vits14_reg": "dinov2_vits14_reg4_pretrain",
    "dino_vits16": "dino_deitsmall16_pretrain",
    "dino_vitb8": "dino_vitbase8_pretrain",
}
NAMED = {  # any name -> row
    "vits16": "dinov3_vits16",
    "vitb16": "dinov3_vitb16",
    "vith16plus": "dinov3_vith16plus",
    "vit7b16": "dinov3_vit7b16",
    "vitl16_sat493m": "dinov3_vitl16_sat493m",
    "nano": "nano",
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": "dinov3_vits16plus",
    "facebook/dinov3-vit7b16-pretrain-sat493m": "dinov3_vit7b16_sat493m",
    "facebook/dinov2-base": "dinov2_vitb14",
    "facebook/dinov2-with-registers-giant": "dinov2_vitg14_reg",
    "facebook/dino-vitb8": "dino_vitb8",
    "hf-hub:facebook/dinov2-small": "dinov2_vits14",
    "timm/vit_huge_plus_patch16_dinov3.lvd1689m": "dinov3_vith16plus",
    "hf_hub:timm/vit_huge_plus_patch16_dinov3.lvd1689m": "dinov3_vith16plus",
    "vit_huge_plus_patch16_dinov3.lvd1689m": "dinov3_vith16plus",
    "timm/vit_base_patch16_dinov3_qkvb.lvd1689m": "dinov3_vitb16",
    "vit_base_patch16_dinov3_qkvb.lvd1689m": "dinov3_vitb16",
    "vit_large_patch16_dinov3_qkvb.sat493m": "dinov3_vitl16_sat493m",
    "timm/vit_giant_patch14_reg4_dinov2.lvd142m": "dinov2_vitg14_reg",
    "vit_small_patch14_dinov2.lvd142m": "dinov2_vits14",
    "vit_base_patch8_224.dino": "dino_vitb8",
    "vit_large_patch16_lingbot.robbyant": "lingbot_vitl16",
    # without a tag timm takes its first one, which is that of the row
    "vit_small_patch16_dinov3": "dinov3_vits16",
    "timm/vit_large_patch16_dinov3": "dinov3_vitl16",
    "vit_large_patch16_dinov3_qkvb": "dinov3_vitl16",
    "vit_small_patch14_reg4_dinov2": "dinov2_vits14_reg",
    "vit_giant_patch16_lingbot": "lingbot_vitg16",
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def ours(config: ViTConfig) -> int:
    with torch.device("meta"):
        return count(VisionTransformer(config))


def dead_key_bias(config: ViTConfig) -> int:
    """Elements of the masked key bias, which our qkv bias and Meta's files have, and others leave out."""
    return config.depth * config.embed_dim if config.qkv_bias and not config.key_bias else 0


def test_names() -> None:
    """The released models, in their listed order."""
    v3 = ["vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16", "vitl16_sat493m", "vit7b16_sat493m"]
    v2 = [f"dinov2_vit{size}14{registers}" for registers in ("", "_reg") for size in "sblg"]
    v1 = ["dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"]
    lingbot = [f"lingbot_vit{size}16" for size in "sblg"]
    v3 += [f"convnext_{size}" for size in ("tiny", "small", "base", "large")]
    eupe = [f"eupe_vit{size}16" for size in "tsb"] + [f"eupe_convnext_{size}" for size in ("tiny", "small", "base")]
    assert list_models() == [*(f"dinov3_{name}" for name in v3), *v2, *v1, *lingbot, *eupe, "nano"]
    assert {row.architecture for row in MODELS.values()} == set(ARCHITECTURES)
    for column in ("hub_id", "timm_id", "meta_file"):
        values = [getattr(row, column) for row in MODELS.values() if getattr(row, column)]
        assert len(values) == len(set(values)), column


VITS = [name for name, row in MODELS.items() if isinstance(row.config, ViTConfig)]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in VITS and not name.startswith("lingbot")])
def test_parameters_of_transformers(name: str) -> None:
    """The parameter count equals that of transformers' model, plus the masked key bias."""
    config = ARCHITECTURES[name]
    assert ours(config) - dead_key_bias(config) == count(hf_shapes(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name: str) -> None:
    """The parameter counts equal the published ones of Meta's modules and transformers'."""
    config = MODELS[name].config
    meta, hf = PUBLISHED[name]
    assert ours(replace(config, local_cls_norm=name in WITH_LOCAL_NORM)) == meta
    assert ours(config) - dead_key_bias(config) == hf


@pytest.mark.parametrize("name", MILLIONS)
def test_published_millions(name: str) -> None:
    """DINOv2 and DINO, whose sizes are published with four or more digits; registers add four tokens."""
    assert round(ours(MODELS[name].config) / 1e6, 2) == MILLIONS[name]
    if name.startswith("dinov2"):
        config = MODELS[f"{name}_reg"].config
        assert ours(config) == ours(MODELS[name].config) + 4 * config.embed_dim


@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name in VITS if MODELS[name].timm_id])
def test_parameters_of_timm(name: str) -> None:
    """timm's model has no mask token, no masked key bias, and no class position beside registers."""
    import timm

    row, config = MODELS[name], MODELS[name].config
    plain = row.timm_id.rpartition("/")[2]
    with torch.device("meta"):
        theirs = count(timm.create_model(plain, num_classes=0))
    biases = dead_key_bias(config)
    if row.family == "dinov3":  # the plain variant leaves out the biases of queries and values too
        biases *= 3
        architecture = plain.split(".")[0]
        assert round(theirs / 1e6, 2) == TIMM_MILLIONS[row.architecture], architecture
    folded = config.embed_dim if config.position_grid and config.num_registers else 0
    masked = config.embed_dim if config.mask_token else 0
    assert ours(config) - biases - folded - masked == theirs


@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.timm_id])
def test_timm_agrees(name: str) -> None:
    """timm's repository, licence and "timm" transform are those of the row."""
    import timm

    row = MODELS[name]
    theirs = timm.get_pretrained_cfg(row.timm_id.rpartition("/")[2])
    assert theirs.hf_hub_id == row.timm_id
    assert theirs.license == row.licence.lower().replace(" ", "-")
    transform = preprocess_of(row, "timm")
    assert (theirs.mean, theirs.std) == (transform.mean, transform.std)
    assert theirs.input_size[1:] == (transform.size, transform.size)
    assert (theirs.interpolation, theirs.crop_mode) == (
        transform.filter, {"crop": "center", "squash": "squash"}[transform.fit],
    )  # fmt: skip
    assert transform.resize_to in (None, int(transform.size / theirs.crop_pct))


@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name, row in MODELS.items() if row.timm_id])
def test_a_timm_name_without_tag(name: str) -> None:
    """Without a tag timm loads its default: so do we, or we refuse a name whose architecture several models share."""
    import timm

    architecture = MODELS[name].timm_id.rpartition("/")[2].split(".")[0]
    try:
        found = find(architecture)
    except (ModelNotFoundError, UnsupportedError):
        assert MODELS[name].family == "dino" or "convnext" in name
    else:
        plain = found.timm_id.replace("_qkvb", "")
        assert plain.endswith(f"/{architecture.replace('_qkvb', '')}.{timm.get_pretrained_cfg(architecture).tag}")


@pytest.mark.parametrize("name", NAMED)
def test_find(name: str) -> None:
    """Bare names, hub ids, and timm's names with and without tag, owner and biases."""
    assert find(name) is MODELS[NAMED[name]]


@pytest.mark.parametrize("row", MODELS.values(), ids=lambda row: row.name)
def test_find_every_row(row: ModelInfo) -> None:
    """Each row is found by all of its names, and its Meta file has the published name."""
    for name in (row.name, row.hub_id, row.timm_id):
        assert name is None or find(name) is row
    assert row.meta_file == META_FILES.get(row.name, row.meta_file)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("vits-16", "'vits16'"),
        ("dinov3-vitb16", "'dinov3_vitb16'"),
        ("DINOv3_ViTL16", "'dinov3_vitl16'"),
        ("dinov2_vits16", "'dinov2_vits14'"),
        ("dinov2_vitb14_reg4", "'dinov2_vitb14_reg'"),
        ("dino_vits_8", "'dino_vits8'"),
    ],
)
def test_unknown_names_come_with_suggestions(name: str, suggestion: str) -> None:
    """The error for a misspelled name suggests the right one."""
    with pytest.raises(ModelNotFoundError, match="did you mean") as caught:
        find(name)
    assert suggestion in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["resnet", "clip-vit", "vit_small_patch16_224", "", "facebook/dinov4-vits16"])
def test_unknown_names(name: str) -> None:
    """The error for other models says what may be given."""
    with pytest.raises(ModelNotFoundError, match=r"list_models\(\)"):
        find(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_tiny", "dinov3_convnext_{tiny"),
        ("facebook/convnext-base-224", "ConvNeXts"),
        ("timm/convnext_large.fb_in22k", "ConvNeXts"),
        ("dinov2_vits14_lc", "load_head"),
        ("dinov2_vitb14_dd", "load_head"),
        ("dinov3_vit7b16_lc", "load_head"),
        ("vitl16plus", "never released"),
        ("dinov3_vitl16plus", "never released"),
        ("dino_resnet50", "dino_vit"),
        ("dino_xcit_small_12_p16", "dino_vit"),
    ],
)
def test_models_that_exist_elsewhere(name: str, reason: str) -> None:
    """Models that are not supported are refused by name, with the reason."""
    with pytest.raises(UnsupportedError, match=reason) as caught:
        find(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("row", MODELS.values(), ids=lambda row: row.name)
def test_licence_and_transform(row: ModelInfo) -> None:
    """DINOv3's weights have their own licence and are gated; satellite models have their own statistics."""
    v3 = row.family == "dinov3" and row.name != "nano"
    licence = "FAIR Noncommercial Research License" if row.family == "eupe" else "Apache-2.0"
    assert (row.licence, row.gated) == (("DINOv3 License", True) if v3 else (licence, False))
    transform = preprocess_of(row)
    assert (transform.mean, transform.std) == (SATELLITE if row.name.endswith("sat493m") else IMAGENET)
    assert (transform.mean, transform.std) == (row.mean, row.std)
    assert transform.size == {"dinov3": 256, "dinov2": 224, "dino": 224, "lingbot": 512, "eupe": 256}[row.family]
    assert transform.size % row.config.patch_size == 0 and transform.patch_size == row.config.patch_size
    assert (transform.fit, transform.filter) == ("squash", "bilinear")


@pytest.mark.parametrize(("name", "style"), [("lingbot_vits16", "hf"), ("dinov3_vits16", "torchvision")])
def test_styles_that_do_not_exist(name: str, style: str) -> None:
    """The error for a transform that a family does not have lists those that it has."""
    with pytest.raises(InputError, match="'timm'"):
        preprocess_of(MODELS[name], style)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [n for n, row in MODELS.items() if row.timm_id and row.family != "eupe" and "sat" not in n]
)
def test_find_architecture(name: str) -> None:
    """timm's config.json names the architecture without a tag, which gives the heads of the row."""
    architecture = MODELS[name].timm_id.rpartition("/")[2].split(".")[0].replace("_qkvb", "")
    for written in (architecture, architecture.replace("_dinov3", "_dinov3_qkvb")):
        found = find_architecture(written)
        assert found is not None and found.config == MODELS[name].config
    assert find_architecture("vit_base_patch16_clip_224") is None
