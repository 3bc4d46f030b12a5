"""Checkpoints in use, built as their owners publish them, give the features of their own library for an image file.

Each has its full width and two blocks, random weights, and the files of its repository.  Settings that a repository
does not state differ from every default here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import meta_named
from oracles import hf_model, hf_tokens, randomise, relative, tokens
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov3_infer import Backbone, ViTConfig

pytestmark = [pytest.mark.peers, pytest.mark.slow]

SAME = 5e-6
OWN = dict(mean=[0.707, 0.579, 0.704], std=[0.212, 0.23, 0.178])
IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


@dataclass
class Wild:
    """The content of a repository, and the results of its own library for pixels and for an image file."""

    tokens: Callable[[Tensor], Tensor]
    pixels: Callable[[Image.Image], Tensor] | None  # None where the repository states no transform
    heads: int
    eps: float
    options: dict[str, Any]


def timm_repository(
    place: Path, architecture: str, cfg: dict[str, Any], stated: dict[str, Any] | None = None, *,
    unsaid: dict[str, Any] | None = None, file: str = "model.safetensors", heads: int = 0, **options: Any,
) -> Wild:  # fmt: skip
    """`stated`: model_args of config.json; `unsaid`: arguments that the tensors show."""
    import timm
    from timm.data import create_transform, resolve_data_config

    arguments = (stated or {}) | (unsaid or {})
    model = randomise(timm.create_model(architecture, pretrained=False, **{"num_classes": 0, "depth": 2} | arguments))
    named = {k: v for k, v in (stated or {}).items() if isinstance(v, (int, float, str, bool))}
    config: dict[str, Any] = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": cfg}
    (place / "config.json").write_text(json.dumps(config | ({"model_args": named} if named else {})))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, place / file) if file.endswith("safetensors") else torch.save(state, place / file)
    transform = create_transform(**resolve_data_config(cfg, pretrained_cfg=cfg))
    found = model.blocks[0].attn.num_heads
    assert heads in (0, found)
    return Wild(model.forward_features, lambda image: transform(image), found, model.blocks[0].norm1.eps, options)


def timm_cfg(side: int, statistics: dict[str, Any], share: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "input_size": [3, side, side], "interpolation": "bicubic", "crop_pct": share, "crop_mode": "center",
        **statistics, "num_classes": 0, **more,
    }  # fmt: skip


def swiglu(**more: Any) -> dict[str, Any]:
    from timm.layers import SwiGLUPacked

    return dict(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, **more)


def processor(side: int, statistics: dict[str, Any], short: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": short or side},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, "image_mean": statistics["mean"],
        "image_std": statistics["std"], **more,
    }  # fmt: skip


def hf_repository(
    place: Path,
    config: ViTConfig,
    stated: dict[str, Any] | None,
    *,
    shards: str = "5GB",
    edit: dict[str, Any] | None = None,
) -> Wild:
    import transformers

    model = hf_model(config)
    model.save_pretrained(place, max_shard_size=shards)
    if edit:
        content = json.loads((place / "config.json").read_text()) | edit
        (place / "config.json").write_text(json.dumps(content))
    if stated is not None:
        (place / "preprocessor_config.json").write_text(json.dumps(stated))
        kind = getattr(transformers, stated["image_processor_type"].removesuffix("Fast") + "Pil")
        theirs = kind(**{k: v for k, v in stated.items() if k != "image_processor_type"})
    return Wild(
        lambda pixels: hf_tokens(model, pixels),
        None if stated is None else lambda image: torch.as_tensor(np.array(theirs(image)["pixel_values"])[0]),
        config.num_heads, config.norm_eps, {},
    )  # fmt: skip


def meta_file(
    place: Path,
    config: ViTConfig,
    file: str,
    wrap: Callable[[dict[str, Tensor]], Any] = lambda state: state,
    **options: Any,
) -> Wild:
    """Meta's names; transformers is the oracle on the grid of the positions, where all rules agree."""
    model = hf_model(config)
    torch.save(wrap(meta_named(model.state_dict(), config)), place / file)
    return Wild(lambda pixels: hf_tokens(model, pixels), None, config.num_heads, config.norm_eps, options)


def tipsv2(place: Path) -> Wild:
    """The owner's names, with a text tower, and with a second class token among the registers."""
    from transformers import Tipsv2Config, Tipsv2Model

    vision = dict(
        hidden_size=1152, num_hidden_layers=2, num_attention_heads=16, image_size=448, mlp_ratio=4304 / 1152,
        layer_norm_eps=3e-6,
    )  # fmt: skip
    text = dict(hidden_size=1152, num_hidden_layers=1, num_attention_heads=16, intermediate_size=32, vocab_size=50)
    model = randomise(Tipsv2Model(Tipsv2Config(vision_config=vision, text_config=text)))
    model.save_pretrained(place)
    return Wild(lambda pixels: model.vision_model(pixels).last_hidden_state, None, 16, 3e-6, {})


def v2(width: int, heads: int, grid: int, patch: int = 14, registers: int = 0, **more: Any) -> ViTConfig:
    return ViTConfig(
        width, 2, heads, **{
            "ffn_dim": 4 * width, "patch_size": patch, "position_grid": grid, "num_registers": registers,
            "key_bias": True, "norm_eps": 1e-6, "position_resize": "antialias" if registers else "size", **more,
        },
    )  # fmt: skip


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


GIANT = dict(ffn_dim=4096, gated=True)

WILD: dict[str, Callable[[Path], Wild]] = {
    "2 UNI": lambda d: timm_repository(
        d,
        "vit_large_patch16_224",
        timm_cfg(224, OWN, 0.9),
        dict(img_size=224, init_values=1e-5, dynamic_img_size=True),
        file="pytorch_model.bin",
        heads=16,
    ),
    "3 Phikon-v2": lambda d: hf_repository(d, v2(1024, 16, 14, 16, norm_eps=3e-6), processor(224, OWN, 240)),
    "4 UNI2-h": lambda d: timm_repository(
        d,
        "vit_giant_patch14_224",
        timm_cfg(224, OWN),
        dict(
            img_size=224,
            patch_size=14,
            num_heads=24,
            init_values=1e-5,
            embed_dim=1536,
            mlp_ratio=2.66667 * 2,
            reg_tokens=8,
            no_embed_class=True,
            dynamic_img_size=True,
        ),
        unsaid=swiglu(),
        heads=24,
    ),
    "5 Virchow": lambda d: timm_repository(
        d,
        "vit_huge_patch14_224",
        timm_cfg(224, OWN),
        dict(img_size=224, init_values=1e-5, mlp_ratio=5.3375, dynamic_img_size=True),
        unsaid=swiglu(),
        heads=16,
    ),
    "5 Virchow2": lambda d: timm_repository(
        d,
        "vit_huge_patch14_224",
        timm_cfg(224, OWN),
        dict(img_size=224, init_values=1e-5, mlp_ratio=5.3375, reg_tokens=4, dynamic_img_size=True),
        unsaid=swiglu(),
        heads=16,
    ),
    "6 GigaPath": lambda d: timm_repository(
        d,
        "vit_giant_patch14_dinov2",
        timm_cfg(224, OWN, 0.875),
        dict(img_size=224, patch_size=16, in_chans=3),
        heads=24,
    ),
    "7 H-optimus-0": lambda d: timm_repository(
        d,
        "vit_giant_patch14_reg4_dinov2",
        timm_cfg(224, OWN, 0.95, tag="x"),
        dict(img_size=224, init_values=1e-5),
        heads=24,
    ),
    "7 H0-mini": lambda d: timm_repository(
        d,
        "vit_base_patch14_reg4_dinov2",
        timm_cfg(224, OWN, 0.9),
        dict(img_size=224, init_values=1e-5, mlp_ratio=5.33334),
        unsaid=swiglu(),
        heads=12,
    ),
    "8 RAD-DINO": lambda d: hf_repository(
        d, v2(768, 12, 37), processor(518, dict(mean=[0.5307] * 3, std=[0.2583] * 3))
    ),
    **{
        f"9 EUPE {size}": lambda d, size=size: timm_repository(
            d, f"vit_{size}_patch16_dinov3_qkvb", timm_cfg(224, OWN, 0.9, tag="eupe_lvd1689m")
        )
        for size in ("tiny", "small", "base")
    },
    **{
        f"10 TIPSv2 {size}": lambda d, size=size: timm_repository(
            d,
            f"vit_{size}_patch14_reg1_tipsv2",
            timm_cfg(448, dict(mean=[0.0] * 3, std=[1.0] * 3)),
            heads={"so400m": 16}.get(size, 0),
        )
        for size in ("base", "so400m")
    },
    "10 TIPSv2 so400m, Google": tipsv2,
    "11 LingBot g": lambda d: meta_file(d, ViTConfig(1536, 2, 24, 4096, gated=True, qkv_bias=False), "model.pt"),
    "12 Midnight": lambda d: hf_repository(
        d, v2(1536, 24, 16, **GIANT), processor(224, dict(mean=[0.5] * 3, std=[0.5] * 3), 232, resample=2)
    ),
    "12 OpenMidnight": lambda d: meta_file(
        d,
        v2(1536, 24, 16, registers=4, **GIANT),
        "teacher_checkpoint_load.pt",
        lambda state: under("backbone.", state),
        num_heads=24,
    ),
    "13 Hibou-B": lambda d: hf_repository(
        d,
        v2(768, 12, 16, registers=4, ffn_dim=2048, gated=True, norm_eps=2e-6),
        processor(224, OWN),
        edit={"model_type": "dinov2"},
    ),
    "14 Web-DINO": lambda d: hf_repository(d, v2(1024, 16, 27, norm_eps=2e-6), processor(378, OWN), shards="20MB"),
    "15 DINOv3 T+": lambda d: meta_file(
        d,
        ViTConfig(192, 2, 3, 512, gated=True),
        "dinov3_vitt16plus.pth",
        lambda state: {"teacher": under("backbone.", state)},
    ),
    "16 depth": lambda d: meta_file(
        d,
        v2(384, 6, 37),
        "depth.pth",
        lambda state: under("pretrained.", state) | {"depth_head.x": torch.ones(2)},
        num_heads=6,
    ),
    "17 Franca": lambda d: meta_file(
        d,
        v2(768, 12, 37),
        "franca.pth",
        lambda state: {
            "teacher": under("module.backbone.", {k.replace("blocks.", "blocks.0."): v for k, v in state.items()})
        },
        num_heads=12,
    ),
    "18 GPFM": lambda d: meta_file(d, v2(1024, 16, 16), "GPFM.pth", num_heads=16),
    "18 Lunit": lambda d: timm_repository(
        d, "vit_small_patch8_224", timm_cfg(224, OWN, 0.9), dict(img_size=224), heads=6
    ),
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, columns = np.mgrid[0:470, 0:611]
    levels = np.stack((rows % 256, columns % 256, (rows * columns // 97) % 256), axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(levels).save(path)
    return path


@pytest.mark.parametrize("name", WILD)
def test_the_features_of_an_image_file(
    name: str, photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = WILD[name](tmp_path)
    bb = Backbone.from_pretrained(tmp_path, device="cpu", **theirs.options)
    assert (bb.config.num_heads, bb.config.norm_eps) == (theirs.heads, theirs.eps)
    for field, text in bb.origin.items():
        assert "default" not in text or f"the {field}" in caplog.text, (field, text)
    if theirs.pixels is not None:
        with Image.open(photo) as image:
            pixels = theirs.pixels(image.convert("RGB"))[None]
        found = bb.preprocess.batch([photo]).pixels
        assert found.shape == pixels.shape and (found - pixels).abs().max() < 2e-6
        for style in ("hf", "timm"):  # what the repository states is the transform of that library
            if (tmp_path / "preprocessor_config.json").exists() is (style == "hf"):
                assert Backbone.from_pretrained(tmp_path, device="cpu", preprocessing=style).preprocess == bb.preprocess
    else:
        side = (bb.config.position_grid or 5) * bb.patch_size
        pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected = theirs.tokens(pixels)
        assert relative(tokens(bb(pixels)), expected) < SAME
    if theirs.pixels is not None:
        found = bb.extract_features(photo)
        assert relative(found.last_hidden_state, expected) < SAME
    again = Backbone.from_pretrained(bb.save_pretrained(tmp_path / "again"), device="cpu")
    assert (again.preprocess, again.info) == (bb.preprocess, bb.info) and again.fingerprint() == bb.fingerprint()
