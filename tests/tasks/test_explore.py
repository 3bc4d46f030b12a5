"""The page of similar patches: stored cosines, escaped names, and its behaviour in a real browser."""

import base64
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL, randomise
from pictures import complaint, photo
from repository import EXAMPLES

from dinov3_infer import Backbone, InputError
from dinov3_infer.tasks.explore import STEP, explore, largest_error, pack

CAT = EXAMPLES / "cat.jpg"


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


def content(page: Path) -> dict[str, Any]:
    (found,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    return json.loads(found)  # type: ignore[no-any-return]


def stored_tokens(data: dict[str, Any]) -> np.ndarray:
    """The tokens [N, C] int16, as the script of the page reads them."""
    low, high = np.frombuffer(zlib.decompress(base64.b64decode(data["tokens"])), np.uint8).reshape(2, data["width"], -1)
    return (low.astype(np.uint16) | high.astype(np.uint16) << 8).view(np.int16).T


@pytest.mark.parametrize("width", [64, 192, 384, 1024])
@pytest.mark.parametrize("kind", ["even", "one large channel", "nearly the same", "a zero"])
def test_stored_cosines_are_near_the_exact_ones(width: int, kind: str) -> None:
    """Over all pairs they differ by at most 0.01, for the widths of models and different channel statistics."""
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randn(600, width, generator=generator)
    if kind == "one large channel":
        tokens[:, 3] += 200
    if kind == "nearly the same":
        tokens = 1000 * (torch.randn(width, generator=generator) + 0.01 * tokens)
    if kind == "a zero":
        tokens[5] = 0
    packed = pack(tokens)
    error, pairs = largest_error(tokens, packed)
    assert packed.dtype == np.int16 and pairs == 600 * 600
    assert error < 0.01
    exact = F.normalize(tokens, dim=1) @ F.normalize(tokens, dim=1).T
    stored = packed.astype(np.int64) @ packed.astype(np.int64).T * STEP**2
    assert np.abs(exact.numpy() - stored).max() == pytest.approx(error, abs=1e-5)
    some, fewer = largest_error(tokens, packed, 40)
    assert some <= error + 1e-6 and fewer == 40 * 600


def test_the_page_holds_what_the_model_gives(bb: Backbone, tmp_path: Path) -> None:
    images = [CAT, photo(70, 130)]
    found = explore(bb, images, tmp_path / "e.html", size=160)
    data = content(tmp_path / "e.html")
    features = [bb.extract_features(image, size=160, fit="native") for image in images]
    assert [(one["h"], one["w"]) for one in data["images"]] == [f.grid for f in features]
    assert [one["name"] for one in data["images"]] == ["cat.jpg", "image 1"] and found.patches == 7 * 10 + 5 * 10
    tokens = stored_tokens(data)
    exact = F.normalize(torch.cat([f.patch_tokens[0] for f in features]), dim=1)
    cosines = tokens.astype(np.float64) @ tokens.T.astype(np.float64) * data["step"] ** 2
    assert np.abs(cosines - (exact @ exact.T).numpy()).max() <= found.error + 1e-6
    attention = bb.attention_maps(CAT, size=160)[0].mean(0).numpy()
    shown = np.frombuffer(base64.b64decode(data["images"][0]["attention"]), np.uint8).reshape(attention.shape)
    assert np.corrcoef(shown.ravel(), attention.ravel())[0, 1] > 0.95 and shown.max() == 255
    assert f"{found.error:.4f}" in data["about"] and "nano" in data["about"]


def test_the_page_uses_no_network(bb: Backbone, tmp_path: Path) -> None:
    explore(bb, [CAT], tmp_path / "e.html", size=64)
    page = (tmp_path / "e.html").read_text("utf-8")
    assert "default-src 'none'" in page and not re.search(r"https?:|<link|src=\"(?!data)|@import|fetch\(|url\(", page)


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", "<!--", '"&\\', "猫\u2028.jpg", "{{DATA}}"])
def test_names_stay_text(name: str, bb: Backbone, tmp_path: Path) -> None:
    explore(bb, [CAT], tmp_path / "e.html", names=[name], size=64)
    assert content(tmp_path / "e.html")["images"][0]["name"] == name
    assert (tmp_path / "e.html").read_text("utf-8").count("</script>") == 2


@pytest.mark.parametrize("fit", ["squash", "crop", "native"])
def test_the_image_is_the_part_that_was_seen(fit: Any, bb: Backbone, tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    explore(bb, [CAT], tmp_path / "e.html", size=96, fit=fit)
    (one,) = content(tmp_path / "e.html")["images"]
    shown = np.asarray(Image.open(BytesIO(base64.b64decode(one["jpeg"]))), np.float32) / 255
    assert shown.shape == (one["h"] * 16, one["w"] * 16, 3)
    seen = bb.preprocess.with_options(96, fit)(CAT).permute(1, 2, 0).numpy() * bb.preprocess.std + bb.preprocess.mean
    assert np.abs(shown - seen).mean() < 0.03


def test_what_cannot_be_explored_is_said(bb: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "e.html"
    assert "does not show padding" in complaint(InputError, lambda: explore(bb, [CAT], out, fit="pad"))
    assert "got no images" in complaint(InputError, lambda: explore(bb, [], out))
    assert "1 images and 2 names" in complaint(InputError, lambda: explore(bb, [CAT], out, names=["a", "b"]))
    assert not out.exists()


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(bb: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Opens the page of two images, offline, in a headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the path")
    file = tmp_path_factory.mktemp("page") / "e.html"
    explore(bb, [CAT, photo(70, 130)], file, names=["a <b>.jpg", "b.jpg"], size=256)
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def opened(**options: Any) -> Any:
            page = chromium.new_context(offline=True, viewport={"width": 1000, "height": 800}, **options).new_page()
            page.problems = []
            page.on("console", lambda m: "willReadFrequently" in m.text or page.problems.append(m.text))  # by `drawn`
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("request", lambda r: r.url.startswith(("file:", "data:")) or page.problems.append(r.url))
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-ready]")
            return page

        opened.data = content(file)  # type: ignore[attr-defined]
        yield opened
        chromium.close()


def hover(page: Any, image: int, x: float, y: float) -> None:
    box = page.locator(".view").nth(image).bounding_box()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.wait_for_timeout(150)


def drawn(page: Any, image: int) -> np.ndarray:
    """The pixels of the canvas over an image, [h, w, 4] uint8."""
    script = """n => { const c = document.querySelectorAll('.view canvas')[n];
        return [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }"""
    height, width, *values = page.evaluate(script, image)
    return np.array(values, np.uint8).reshape(height, width, 4)


@browser
def test_a_hover_shows_what_is_similar(pages: Any) -> None:
    page = pages()
    assert not drawn(page, 0)[..., 3].any() and page.inner_text("figcaption >> nth=0") == "a <b>.jpg"
    hover(page, 0, 0.55, 0.45)
    data, status = pages.data, page.inner_text("#status")
    h, w = data["images"][0]["h"], data["images"][0]["w"]
    row, column = int(0.45 * h), int(0.55 * w)
    assert status.startswith(
        f"a <b>.jpg, row {row + 1} of {h}, column {column + 1} of {w}; most similar elsewhere: b.jpg"
    )
    tokens = stored_tokens(data)
    cosines = tokens.astype(int) @ tokens[row * w + column].astype(int) * data["step"] ** 2
    heat = np.frombuffer(base64.b64decode(data["heat"]), np.uint8).reshape(256, 3)
    threshold = float(page.input_value("#threshold"))
    for image, part in ((0, cosines[: h * w]), (1, cosines[h * w :])):
        shown = drawn(page, image).reshape(-1, 4)
        away = np.abs(part - threshold) > 1e-3
        assert ((shown[:, 3] > 0) == (part >= threshold))[away].all()
        level = np.round(np.clip((part - data["low"]) / (1 - data["low"]), 0, 1) * 255).astype(int)
        bright = shown[:, 3] > 0
        assert np.abs(shown[bright, :3].astype(int) - heat[level[bright]]).max() <= 6
    assert f"cosine {cosines[h * w :].max():.2f}" in status
    assert float(page.evaluate("document.documentElement.dataset.milliseconds")) < 50
    assert page.problems == []


@browser
def test_the_threshold_views_and_holding(pages: Any) -> None:
    page = pages()
    hover(page, 0, 0.5, 0.5)
    before = (drawn(page, 0)[..., 3] > 0).sum()
    page.evaluate(
        "() => { const s = document.getElementById('threshold'); s.value = 0.9; s.dispatchEvent(new Event('input')); }"
    )
    assert (drawn(page, 0)[..., 3] > 0).sum() < before and page.inner_text("#cut-value") == "0.90"
    page.keyboard.press("2")
    colours = np.frombuffer(base64.b64decode(pages.data["images"][1]["pca"]), np.uint8)
    assert np.abs(drawn(page, 1)[..., :3].reshape(-1).astype(int) - colours).max() <= 3
    assert not page.is_visible("#legend") and not page.is_visible("#cut")
    page.keyboard.press("3")
    assert page.is_visible("#legend") and page.inner_text("#high") == "high"
    page.click("input[value=similarity]")
    page.locator(".view").nth(1).click(position={"x": 10, "y": 10})
    page.wait_for_timeout(150)
    held = page.inner_text("#status")
    assert held.startswith("b.jpg, row 1 of") and held.endswith("; held")
    hover(page, 0, 0.2, 0.2)
    assert page.inner_text("#status") == held
    page.keyboard.press("Escape")
    hover(page, 0, 0.3, 0.2)
    assert page.inner_text("#status").startswith("a <b>.jpg") and page.problems == []


@browser
def test_the_keyboard_alone(pages: Any) -> None:
    page = pages()
    for _ in range(5):  # the views and the threshold come first
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "view":
            break
    assert page.evaluate("document.activeElement.className") == "view"
    page.keyboard.press("ArrowRight")
    first = page.wait_for_function(
        "document.getElementById('status').textContent.includes('held')"
    ) and page.inner_text("#status")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(150)
    second = page.inner_text("#status")
    numbers = [list(map(int, re.findall(r"row (\d+) of \d+, column (\d+)", text)[0])) for text in (first, second)]
    assert numbers[1] == [numbers[0][0] + 1, numbers[0][1]] and page.problems == []


@browser
def test_touch_chooses_and_dark_is_dark(pages: Any) -> None:
    page = pages(has_touch=True, color_scheme="dark")
    box = page.locator(".view").first.bounding_box()
    page.touchscreen.tap(box["x"] + 20, box["y"] + 20)
    page.wait_for_timeout(150)
    assert "; held" in page.inner_text("#status") and drawn(page, 0)[..., 3].any()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 26)"
    light = pages(color_scheme="light")
    assert light.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.problems == light.problems == []


def test_a_model_without_attention_has_two_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov3_infer import UnsupportedError

    bb: Any = randomise(Backbone.from_config(SMALL["dinov3"]))

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedError("this network has no attention")

    monkeypatch.setattr(bb, "attention_maps", refuse)
    explore(bb, [CAT], tmp_path / "e.html", size=64)
    assert content(tmp_path / "e.html")["images"][0]["attention"] is None
