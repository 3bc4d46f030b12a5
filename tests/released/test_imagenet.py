"""The released classifiers, against transformers' models and against a composition of a few lines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomise, relative
from pictures import photo
from torch import Tensor

from dinov3_infer import Backbone, CheckpointError, GatedModelError, InputError, ModelNotFoundError
from dinov3_infer.released.attach import load_head
from dinov3_infer.released.catalogue import HEADS, find_head
from dinov3_infer.released.imagenet import Classifier, imagenet_names
from dinov3_infer.zoo import MODELS

pytestmark = pytest.mark.usefixtures("no_grad")

PARAMETERS = {  # (name, layers): of the head, as published
    ("dinov2_vits14_lc", 1): 769_000, ("dinov2_vitb14_lc", 1): 1_537_000, ("dinov2_vitl14_reg_lc", 1): 2_049_000,
    ("dinov2_vitg14_lc", 1): 3_073_000, ("dinov2_vits14_lc", 4): 1_921_000, ("dinov2_vitb14_reg_lc", 4): 3_841_000,
    ("dinov2_vitl14_lc", 4): 5_121_000, ("dinov2_vitg14_reg_lc", 4): 7_681_000, ("dinov3_vit7b16_lc", None): 8_193_000,
    ("dino_vits16_lc", None): 1_537_000, ("dino_vits8_lc", None): 1_537_000, ("dino_vitb16_lc", None): 1_537_000,
    ("dino_vitb8_lc", None): 1_537_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    names = ("dinov2_vits14", "dinov2_vits14_reg", "dino_vits16", "dino_vitb16")
    return {name: randomise(Backbone.from_config(name), 1) for name in names}  # type: ignore[misc]


def put(path: Path, bb: Backbone, width: int, prefix: str = "", classes: int = 1000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {
        "weight": torch.randn(classes, width * bb.embed_dim, generator=generator) * 0.05,
        "bias": torch.randn(classes, generator=generator),
    }
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    return state


@pytest.mark.parametrize(("name", "layers"), PARAMETERS)
def test_parameters_are_those_that_were_published(name: str, layers: int | None) -> None:
    info = find_head(name, layers)
    with torch.device("meta"):
        head = Classifier(info, Backbone.from_config(info.backbone))
    assert sum(t.numel() for t in head.head_state().values()) == PARAMETERS[name, layers]


def last_four(bb: Backbone, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(normed class token, normed patches) of the last four blocks, by Meta's own call."""
    found = bb.get_intermediate_layers(pixels, 4, return_class_token=True)  # type: ignore[operator]
    return [(cls_token, patches) for patches, cls_token in found]


def interleaved(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([part for pair in zip(a.T, b.T, strict=True) for part in pair]).view(-1, len(a)).T


VECTORS = {
    ("dinov2_vits14_lc", 4): (5, lambda four: torch.cat([*(c for c, _ in four), four[-1][1].mean(1)], -1)),
    ("dinov2_vits14_lc", 1): (2, lambda four: torch.cat([four[-1][0], four[-1][1].mean(1)], -1)),
    ("dinov2_vits14_reg_lc", 4): (5, lambda four: torch.cat([*(c for c, _ in four), four[-1][1].mean(1)], -1)),
    ("dino_vits16_lc", None): (4, lambda four: torch.cat([c for c, _ in four], -1)),
    ("dino_vitb16_lc", None): (2, lambda four: interleaved(four[-1][0], four[-1][1].mean(1))),
}


@pytest.mark.parametrize(("name", "layers"), VECTORS)
@pytest.mark.parametrize("prefix", ["", "module.linear."])
def test_logits_are_those_of_the_owner(
    name: str, layers: int | None, prefix: str, backbones: dict[str, Backbone], tmp_path: Path
) -> None:
    """From the vector that each was trained on, and the likeliest classes of an image."""
    info = find_head(name, layers)
    bb = backbones[info.backbone]
    width, vector = VECTORS[name, layers]
    state = put(tmp_path / "head.pth", bb, width, prefix)
    head = load_head(name, bb, weights=tmp_path / "head.pth", variant=layers)
    pixels = torch.randn(2, 3, 8 * bb.patch_size, 8 * bb.patch_size)
    expected = vector(last_four(bb, pixels)) @ state["weight"].T + state["bias"]
    assert relative(head(pixels), expected) < 1e-6
    image = photo(300, 260)
    assert head.preprocess.size == 224 and head.preprocess.resize_to == 256
    (guesses,) = head.predict(image, top=3)
    logits = head(head.preprocess.batch([image]).pixels)[0].softmax(-1)
    assert [guess.label for guess in guesses] == logits.topk(3).indices.tolist()
    assert guesses[0].name == imagenet_names()[guesses[0].label]
    assert guesses[0].probability == pytest.approx(float(logits.max()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("registers", [False, True])
def test_a_model_of_transformers(registers: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Backbone and classifier in one folder, with the names of the classes that it states."""
    import transformers as t

    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    options = {"num_register_tokens": 4} if registers else {}
    config = getattr(t, f"{kind}Config")(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, num_labels=1000, **options
    )
    model = randomise(getattr(t, f"{kind}ForImageClassification")(config), 2)
    model.config.id2label = {i: f"thing {i}" for i in range(1000)}
    model.save_pretrained(tmp_path)
    name = f"dinov2_vits14{'_reg' if registers else ''}_lc"
    head = load_head(name, weights=tmp_path, variant=1, device="cpu")
    pixels = torch.randn(2, 3, 518, 518)  # its own grid, where all resize positions alike
    head, model, pixels = head.to(dtype), model.to(dtype), pixels.to(dtype)
    assert relative(head(pixels), model(pixels).logits) < (1e-9 if dtype == torch.float64 else 5e-6)
    assert head.names[7] == "thing 7" and head.float().predict(photo(60, 60))[0][0].name.startswith("thing ")


def test_the_classes_of_imagenet() -> None:
    names = imagenet_names()
    assert len(names) == len(set(names)) + 1 == 1000  # a crane is a bird and a machine
    assert (names[0], names[281], names[999]) == (
        "tench, Tinca tinca", "tabby, tabby cat", "toilet tissue, toilet paper, bathroom tissue",
    )  # fmt: skip


def test_a_head_is_saved_with_its_backbone(backbones: dict[str, Backbone], tmp_path: Path) -> None:
    """And refused on other weights of the same shape."""
    bb = backbones["dinov2_vits14"]
    put(tmp_path / "head.pth", bb, 5)
    head = load_head("dinov2_vits14_lc", bb, weights=tmp_path / "head.pth")
    path = head.save(tmp_path / "head.safetensors")
    again = load_head("dinov2_vits14_lc", bb, weights=path)
    assert all(torch.equal(t, again.head_state()[n]) for n, t in head.head_state().items())
    other = randomise(Backbone.from_config("dinov2_vits14"), 9)
    with pytest.raises(CheckpointError, match="goes with other weights of its backbone"):
        load_head("dinov2_vits14_lc", other, weights=path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"should end in that"):
        head.save(tmp_path / "head.pth")


def test_what_does_not_fit_is_one_sentence(backbones: dict[str, Backbone], tmp_path: Path) -> None:
    """Another backbone, another file, parts too many or too few, names and variants that are not."""
    bb, path = backbones["dinov2_vits14"], tmp_path / "head.pth"
    put(path, bb, 5)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (InputError, "dinov2_vitb14_lc goes on dinov2_vitb14, and this backbone looks like dinov2_vits14", {}),
        (InputError, "dinov2_vits14_reg_lc goes on dinov2_vits14_reg", {}),
        (CheckpointError, r"1 of another shape: weight \[1000, 1920\] for \[1000, 768\]", dict(variant=1)),
        (InputError, "dinov2_vits14_lc was released for 4 or 1, not for 2", dict(variant=2)),
        (ModelNotFoundError, "unknown head 'dinov2_vits14_lx': did you mean .*'dinov2_vits14_lc'", {}),
    ]
    for kind, words, options in wrong:
        name = next(w for w in words.replace("'", " ").replace(":", " ").split() if w.startswith("dinov2_")) if (
            "dinov2_" in words
        ) else "dinov2_vits14_lc"  # fmt: skip
        with pytest.raises(kind, match=words):
            load_head(name, bb, weights=path, **options)
    state = torch.load(path, weights_only=True)
    torch.save({"weight": state["weight"]}, path)
    with pytest.raises(CheckpointError, match="1 missing: bias"):
        load_head("dinov2_vits14_lc", bb, weights=path)
    torch.save(state | {"extra.weight": state["bias"]}, path)
    with pytest.raises(CheckpointError, match=r"1 left over: extra.weight"):
        load_head("dinov2_vits14_lc", bb, weights=path)
    torch.save(state | {"bias": state["bias"] * float("nan")}, path)
    with pytest.raises(CheckpointError, match="NaN or infinity in bias"):
        load_head("dinov2_vits14_lc", bb, weights=path)
    with pytest.raises(InputError, match="top is a number of classes from 1 to 1000, got 0"):
        load_head("dinov2_vits14_lc", bb, weights=_whole(state, path)).predict(photo(30, 30), top=0)
    with pytest.raises(GatedModelError, match="sent by their owner.*DINOv3 License.*weights="):
        load_head("dinov3_vit7b16_lc")


def _whole(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def test_every_row_goes_on_a_model_of_the_zoo() -> None:
    """Names with their variants are unique, and so are files."""
    assert all(row.backbone in MODELS for row in HEADS)
    assert (
        len({(row.name, row.variant) for row in HEADS}) == len(HEADS) == len({(row.folder, row.file) for row in HEADS})
    )
    assert find_head("dinov2_vitb14_reg_lc").link == (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_linear4_head.pth"
    )
