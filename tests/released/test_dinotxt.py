"""dino.txt: vectors, classes and segments are those of transformers' modules put together; files are read strictly."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import hf_model, hf_tokens, randomise, relative
from pictures import complaint, photo
from PIL import Image
from texts import SMALL, SPLIT, as_meta, clip_tower, clip_vectors, dinov3_layers, small_heads
from torch import Tensor

from dinov3_infer import Backbone, CheckpointError, GatedModelError, InputError, InputTypeError
from dinov3_infer.hub.answers import HubOptions
from dinov3_infer.released import attach, dinotxt
from dinov3_infer.released.attach import load_head
from dinov3_infer.released.catalogue import find_head
from dinov3_infer.released.dinotxt import DinoTxt, clip_templates
from dinov3_infer.released.windows import largest
from dinov3_infer.zoo import MODELS

pytestmark = pytest.mark.usefixtures("no_grad", "rows")

LABELS = ["cat", "tench, Tinca tinca", "a {} of 100 things", "Straße"]
V3, V2 = (f"{name}_tet1280d20h24l" for name in ("dinov3_vitl16_dinotxt", "dinov2_vitl14_reg4_dinotxt"))


@pytest.fixture
def rows() -> Iterator[None]:
    with small_heads():
        yield


class Pair(NamedTuple):
    """Ours, and the same weights in transformers' modules."""

    ours: DinoTxt
    texts: Callable[[list[str]], Tensor]  # -> [B, 2 C]
    tokens: Callable[[Tensor], tuple[Tensor, Tensor]]  # normalised pixels -> class token, patches

    def image(self, pixels: Tensor) -> Tensor:
        cls_token, patches = self.tokens(pixels)
        return torch.cat((cls_token, patches.mean(dim=1)), dim=-1)


def pair_of(ours: DinoTxt, model: torch.nn.Module) -> Pair:
    tower, layers = clip_tower(ours.text_model), dinov3_layers(ours.visual_model.head)

    def tokens(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = layers(hf_tokens(model, pixels))
        return found[:, 0], found[:, 5:]

    return Pair(ours, lambda texts: clip_vectors(tower, ours.tokenizer(texts)), tokens)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    with torch.no_grad(), small_heads():
        model = hf_model(MODELS["nano"].config, 3)
        model.save_pretrained(folder := tmp_path_factory.mktemp("backbone"))  # type: ignore[operator]
        ours = DinoTxt(find_head(SMALL), Backbone.from_pretrained(folder, device="cpu"))
        randomise(ours.visual_model, 4)
        randomise(ours.text_model, 5)
        ours.logit_scale.fill_(3.0)
        return pair_of(ours, model)


@pytest.fixture(scope="module")
def exact(pair: Pair) -> Pair:
    """The same in float64."""
    model = hf_model(MODELS["nano"].config, 3).double()
    with torch.no_grad():
        return pair_of(copy.deepcopy(pair.ours).double(), model)


# --- vectors -------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_transformers(pair: Pair, exact: Pair) -> None:
    texts = ["a photo of a cat.", "", "Two   DOGS &amp; one café, 1234!", "word " * 90]
    assert relative(pair.ours.encode_text(texts), pair.texts(texts)) < 1e-6
    assert relative(exact.ours.encode_text(texts), exact.texts(texts)) < 1e-12
    images = [photo(90, 120, seed) for seed in range(3)]
    pixels = pair.ours.preprocess.batch(images).pixels
    assert pixels.shape == (3, 3, 64, 64)
    assert relative(pair.ours.encode_image(images), pair.image(pixels)) < 2e-6
    assert relative(exact.ours.encode_image(pixels.double()), exact.image(pixels.double())) < 1e-7
    for one in (pair.ours.encode_text("a", normalize=True), pair.ours.encode_image(images[0], normalize=True)):
        assert one.shape == (1, 384) and float(one.norm()) == pytest.approx(1, abs=1e-6)


def test_metas_calls(pair: Pair) -> None:
    """Pixels and ids in; what comes out is as DINOv3's code has it, and as DINOv2's where that differs."""
    ours, ids, pixels = pair.ours, pair.ours.tokenizer(["a cat", "two dogs"]), torch.randn(3, 3, 64, 80)
    vectors, patches, own = ours.encode_image_with_patch_tokens(pixels)
    assert relative(vectors, pair.image(pixels)) < 2e-6 and relative(patches, pair.tokens(pixels)[1]) < 2e-6
    assert own.equal(ours.backbone(pixels).patch_tokens) and ours.encode_image(pixels).equal(vectors)
    assert ours.get_visual_class_and_patch_tokens(pixels)[1].equal(patches)
    expected = (F.normalize(vectors, dim=-1), F.normalize(ours.encode_text(ids), dim=-1))
    image, text, scale, *both = ours(pixels, ids)
    assert image.equal(expected[0]) and text.equal(expected[1]) and both[0].equal(patches) and both[1].equal(own)
    assert float(scale) == pytest.approx(np.exp(3), rel=1e-6)
    logits, transposed = ours.get_logits(pixels, ids)
    assert logits.shape == (3, 2) and transposed.equal(logits.T)
    assert relative(logits, float(scale) * image @ text.T) < 1e-6
    older = DinoTxt(find_head(SPLIT), ours.backbone)
    assert len(older(pixels, ids)) == 3 and float(older.logit_scale) == pytest.approx(np.log(1 / 0.07))


def test_tensors_keep_gradients_and_images_have_none(pair: Pair) -> None:
    with torch.enable_grad():
        assert (
            pair.ours.encode_text(pair.ours.tokenizer("a")).requires_grad
            and not pair.ours.encode_text("a").requires_grad
        )
        assert pair.ours.encode_image(torch.randn(1, 3, 64, 64)).requires_grad
        assert not pair.ours.encode_image(photo(64, 64)).requires_grad


def test_company_changes_nothing(pair: Pair) -> None:
    """More texts than one pass takes, and more images, give what each gives by itself."""
    texts = [f"{'very ' * (i % 9)}old thing {i}" for i in range(300)]
    vectors = pair.ours.encode_text(texts)
    assert vectors.shape == (300, 384)
    assert all(relative(pair.ours.encode_text(texts[i])[0], vectors[i]) < 1e-6 for i in (0, 8, 255, 256, 299))
    images = [photo(70 + i, 90, i) for i in range(11)]
    found = pair.ours.encode_image(iter(images))
    assert found.shape == (11, 384)
    assert all(relative(pair.ours.encode_image(images[i])[0], found[i]) < 1e-6 for i in (0, 7, 8, 10))


def test_a_copy_is_whole(pair: Pair) -> None:
    """The backbone is held once, and goes along."""
    again = copy.deepcopy(pair.ours)
    assert again.visual_model.backbone is again.backbone is not pair.ours.backbone
    assert not [name for name in again.state_dict() if name.startswith("visual_model.backbone")]


def test_half_the_memory(pair: Pair) -> None:
    """Weights of 16 bits, vectors of 32, near those of before."""
    narrow = copy.deepcopy(pair.ours).to(torch.bfloat16)
    texts, images = ["a cat", "two dogs"], [photo(70, 90)]
    vectors = narrow.encode_text(texts), narrow.encode_image(images)
    assert [one.dtype for one in vectors] == [torch.float32] * 2
    assert relative(vectors[0], pair.ours.encode_text(texts)) < 0.05
    assert relative(vectors[1], pair.ours.encode_image(images)) < 0.05
    assert len(narrow.classify(images, texts, "{}")[0]) == 2
    assert narrow.segment(images, texts, "{}")[0].labels.shape == (70, 90)


# --- classes -------------------------------------------------------------------------------------------------------


def class_vectors(pair: Pair, half: bool = False) -> Tensor:
    """Each sentence of length 1, their mean, of length 1; for patches the second half is cut out before."""
    rows = []
    for label in LABELS:
        vectors = pair.texts([template.replace("{}", label) for template in clip_templates()])
        vectors = vectors[:, vectors.shape[1] // 2 :] if half else vectors
        mean = (vectors / vectors.norm(dim=-1, keepdim=True)).mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def test_classes_are_those_of_the_protocol(pair: Pair) -> None:
    labels = pair.ours.encode_labels(LABELS)
    assert labels.names == tuple(LABELS) and len(clip_templates()) == 80
    assert relative(labels.vectors, expected := class_vectors(pair)) < 1e-6
    assert relative(labels.dense, class_vectors(pair, half=True)) < 1e-6
    images = [photo(90, 120, seed) for seed in range(3)]
    vectors = F.normalize(pair.image(pair.ours.preprocess.batch(images).pixels), dim=-1)
    logits = 100 * vectors @ expected.T
    assert relative(100 * pair.ours.encode_image(images, normalize=True) @ labels.vectors.T, logits) < 2e-6
    found = pair.ours.classify(images, LABELS)
    for guesses, row in zip(found, logits, strict=True):
        assert [guess.label for guess in guesses] == row.argsort(descending=True).tolist()
        assert [guess.name for guess in guesses] == [LABELS[guess.label] for guess in guesses]
        assert guesses[0].probability == pytest.approx(float(row.softmax(0).max()), rel=1e-3)
    assert pair.ours.classify(images, labels, top=2) == [guesses[:2] for guesses in found]


def test_templates(pair: Pair) -> None:
    one = pair.ours.encode_labels(["cat"], "a photo of a {}.")
    assert relative(one.vectors, F.normalize(pair.texts(["a photo of a cat."]), dim=-1)) < 1e-6
    names = [f"thing {i}" for i in range(200)]
    two = pair.ours.encode_labels(names, ["a {}.", "the {}"])  # more sentences than one pass takes
    expected = F.normalize(pair.texts(["a thing 150.", "the thing 150"]), dim=-1).mean(dim=0)
    assert two.vectors.shape == (200, 384) and relative(two.vectors[150], expected / expected.norm()) < 1e-6


def test_what_cannot_be_told_apart(pair: Pair) -> None:
    ours, image = pair.ours, photo(64, 64)
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (InputError, "labels are a list of names", lambda: ours.classify(image, "cat")),
        (InputError, "got []", lambda: ours.classify(image, [])),
        (InputError, "templates have {} where the label goes", lambda: ours.classify(image, ["cat"], ["a photo"])),
        (InputError, "top is a number of labels from 1 on, got 0", lambda: ours.classify(image, ["cat"], top=0)),
        (
            InputError,
            "size is the short side in pixels, from 16 to 2048, got 8",
            lambda: ours.segment(image, ["a"], size=8),
        ),
        (InputError, "got no texts", lambda: ours.encode_text([])),
        (InputError, "got no images", lambda: ours.classify([], ["cat"], "{}")),
        (
            InputError,
            "labels are a list of names, such as ['cat', 'dog']; got [3]",
            lambda: ours.classify(image, [3], "{}"),
        ),  # type: ignore[list-item]
        (InputTypeError, "a text is a str, got int", lambda: ours.encode_text([3])),  # type: ignore[list-item]
    ]
    for kind, words, call in wrong:
        assert words in complaint(kind, call), words


# --- segments ------------------------------------------------------------------------------------------------------


def scores_of(pair: Pair, image: np.ndarray, size: tuple[int, int], vectors: Tensor) -> Tensor:
    """[K, height, width] by the protocol of Meta's notebook, all windows counted by hand."""
    height, width = size
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pair.ours.preprocess.mean, pair.ours.preprocess.std))
    pixels = (pixels - mean) / std
    total, count = torch.zeros(len(vectors), height, width), torch.zeros(height, width)
    for i in range(max(height - 384 + 191, 0) // 192 + 1):
        for j in range(max(width - 384 + 191, 0) // 192 + 1):
            bottom, right = min(i * 192 + 384, height), min(j * 192 + 384, width)
            top, left = max(bottom - 384, 0), max(right - 384, 0)
            window = pixels[:, :, top:bottom, left:right]
            h, w = (-(-side // 16) for side in window.shape[2:])
            if window.shape[2:] != (16 * h, 16 * w):
                window = F.interpolate(window, size=(16 * h, 16 * w), mode="bicubic", align_corners=False)
            patches = F.normalize(pair.tokens(window)[1], dim=-1)
            cosines = torch.einsum("kc, bpc -> bkp", vectors, patches).unflatten(-1, (h, w))
            cosines = F.interpolate(cosines, size=(bottom - top, right - left), mode="bilinear", align_corners=False)
            total[:, top:bottom, left:right] += cosines[0].softmax(dim=0)
            count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize(
    ("original", "size"),
    [((100, 170), (512, 870)), ((171, 100), (875, 512)), ((40, 400), (204, 2048))],
    ids=["wide", "high", "panorama"],
)
def test_segments_are_those_of_the_protocol(
    original: tuple[int, int], size: tuple[int, int], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, the last of them at the border; sides that are no whole patches are stretched; the size of the image."""
    labels, image = pair.ours.encode_labels(LABELS, "{}"), photo(*original)
    kept: list[Tensor] = []
    monkeypatch.setattr(dinotxt, "largest", lambda scores, size: kept.append(scores) or largest(scores, size))
    (found,) = pair.ours.segment(image, labels)
    expected = scores_of(pair, image, size, labels.dense)
    assert kept[0].shape == (4, *size) and relative(kept[0], expected) < 1e-5
    at_pixels = F.interpolate(expected[None], size=original, mode="bilinear", align_corners=False)[0]
    best = at_pixels.topk(2, dim=0)
    assert found.labels.shape == original and found.labels.dtype == torch.int64 and found.names == labels.names
    sure = best.values[0] - best.values[1] > 1e-5
    assert sure.float().mean() > 0.9 and found.labels[sure].equal(best.indices[0][sure])
    assert len(found.labels.unique()) > 1


def test_segments_of_several_images(pair: Pair) -> None:
    found = pair.ours.segment([photo(30, 40), photo(50, 20)], ["cat", "grass"], "a photo of a {}.")
    assert [tuple(one.labels.shape) for one in found] == [(30, 40), (50, 20)]
    assert found[0].names == ("cat", "grass") and int(found[1].labels.max()) <= 1


# --- files ---------------------------------------------------------------------------------------------------------


def put(folder: Path, *states: dict[str, Tensor]) -> list[Path]:
    paths = [folder / f"{name}.pth" for name, _ in zip("ab", states, strict=False)]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    return paths


def assert_loaded(found: DinoTxt, state: dict[str, Tensor]) -> None:
    loaded = found.head_state()
    assert loaded.keys() == state.keys() and all(loaded[name].equal(tensor) for name, tensor in state.items())
    assert not found.training


def test_metas_files(pair: Pair, tmp_path: Path) -> None:
    """One of DINOv3, two of DINOv2, and one that holds the backbone, too."""
    bb, state = pair.ours.backbone, pair.ours.head_state()
    (path,) = put(tmp_path, *as_meta(state))
    assert len(state) == 32 + 22 + 5 + 1
    assert_loaded(load_head(SMALL, bb, weights=path), state)
    put(tmp_path, state | {f"visual_model.backbone.{n}": t for n, t in bb.state_dict().items()})
    assert_loaded(load_head(SMALL, bb, weights=path), state)
    without = {name: tensor for name, tensor in state.items() if name != "logit_scale"}
    parts = put(tmp_path, *as_meta(without, split=True))
    assert_loaded(load_head(SPLIT, bb, weights=parts), without)
    assert_loaded(load_head(SPLIT, bb, weights=parts[::-1]), without)
    row = replace(find_head(SPLIT), folder="somewhere")
    assert [link.rpartition("/")[2] for link in row.links] == ["a.pth", "b.pth"]
    with mock.patch.object(attach, "download", lambda link, **_: (tmp_path / link.rpartition("/")[2], False)):
        checkpoint = attach._opened(row, None, HubOptions())
    assert len(checkpoint.tensors.shapes) == len(without)


def test_a_head_is_saved_with_its_backbone(pair: Pair, tmp_path: Path) -> None:
    path = pair.ours.save(tmp_path / "head.safetensors")
    assert_loaded(load_head(SMALL, pair.ours.backbone, weights=path), pair.ours.head_state())
    other = Backbone.from_config("nano", seed=9)
    assert "goes with other weights of its backbone" in complaint(
        CheckpointError, lambda: load_head(SMALL, other, weights=path)
    )


def test_what_does_not_fit_is_one_sentence(pair: Pair, tmp_path: Path) -> None:
    """Another file, one of two, a part too many, too few or of another size, NaN, another backbone, no file at all."""
    bb, state = pair.ours.backbone, pair.ours.head_state()
    scale, norm = "logit_scale", "text_model.backbone.ln_final.bias"

    def said(changed: dict[str, Tensor], name: str = SMALL, times: int = 1, **options: Any) -> str:
        paths = put(tmp_path, changed)
        return complaint(CheckpointError, lambda: load_head(name, bb, weights=paths * times, **options))

    assert "1 missing: logit_scale" in said({n: t for n, t in state.items() if n != scale})
    assert "1 left over: text_model.new" in said(state | {"text_model.new": state[scale]})
    assert f"1 of another shape: {norm} [3] for [32]" in said(state | {norm: torch.zeros(3)})
    assert "NaN or infinity in logit_scale" in said(state | {scale: state[scale] * torch.nan})
    assert "1 left over: logit_scale" in said(state, SPLIT)
    half = as_meta({n: t for n, t in state.items() if n != scale}, split=True)[0]
    assert "27 missing: " in (text := said(half, SPLIT)) and text.endswith("give its files as a list: a.pth, b.pth")
    assert "holds block_list.0.attn.proj.bias once more" in said(half, SPLIT, times=2)
    assert "60 missing" in said({"weight": torch.zeros(3, 3)})
    text = complaint(InputError, lambda: load_head(SMALL, Backbone.from_config("dinov3_vits16")))
    assert text.startswith(f"{SMALL} goes on nano, and this backbone looks like dinov3_vits16")
    text = complaint(GatedModelError, lambda: load_head(V3))
    assert "DINOv3 License" in text and "vision_head_and_text_encoder-a442d8f5.pth" in text and "weights=" in text


def test_the_rows() -> None:
    """Where the open one's files lie, and how Meta evaluates each."""
    assert [link.rpartition("/")[2] for link in find_head(V2).links] == [
        f"{V2}_vision_head.pth",
        f"{V2}_text_encoder.pth",
    ]
    assert find_head(V3).links == () and find_head(V3).link is None
    with torch.device("meta"):
        sizes = {
            name: DinoTxt(find_head(name), Backbone.from_config(find_head(name).backbone)).preprocess
            for name in (V3, V2)
        }
    assert (sizes[V3].size, sizes[V3].resize_to, sizes[V3].fit) == (512, None, "crop")
    assert (sizes[V2].size, sizes[V2].resize_to, sizes[V2].fit) == (224, 256, "crop")
