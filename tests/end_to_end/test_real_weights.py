"""Real DINOv2 weights and real photographs, compared with transformers and with a separate resize of the positions."""

import math
from collections.abc import Iterator
from pathlib import Path

import fetch
import numpy as np
import pytest
import torch
from oracles import hf_tokens, relative, tokens, worst_token
from PIL import Image
from torch import Tensor, nn

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.model.positions import resize_positions

pytestmark = pytest.mark.data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("onnx", reason="the real weights lie in an ONNX file: pip install onnx")
    return fetch.write_dinov2_vits14(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def hub(files: tuple[Path, Path]) -> Backbone:
    return Backbone.from_pretrained(files[0], preprocessing="hf", device="cpu")


@pytest.fixture(scope="module")
def meta(files: tuple[Path, Path]) -> Backbone:
    return Backbone.from_pretrained(files[1], device="cpu")


@pytest.fixture(scope="module")
def theirs(files: tuple[Path, Path]) -> Iterator[nn.Module]:
    from transformers import Dinov2Model

    yield Dinov2Model.from_pretrained(files[0], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    return fetch.photographs()


def pixels_of(picture: Image.Image, side: int) -> Tensor:
    """The photograph, [1, 3, side, side], normalised without the package."""
    array = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return torch.from_numpy(((array - MEAN) / STD).transpose(2, 0, 1)[None]).float()


@torch.no_grad()
def compare(ours: nn.Module, theirs: nn.Module, pixels: Tensor, record: pytest.FixtureRequest) -> tuple[float, float]:
    """Relative L2 distance of all tokens and of the worst token; prints both and the largest difference."""
    a, b = tokens(ours(pixels)), hf_tokens(theirs, pixels)
    assert a.shape == b.shape
    whole, worst, largest = relative(a, b), worst_token(a, b), float((a - b).abs().max())
    print(f"{record.node.name}: relative {whole:.2e}, worst token {worst:.2e}, max abs {largest:.2e}")
    return whole, worst


# Twelve float32 blocks summed in another order (qkv as one product instead of three) come to 1e-6; 1e-5 is the promise.
SAME = 1e-5


@pytest.mark.parametrize("side", [224, 518])
def test_a_hub_directory_gives_what_transformers_gives(side, hub, theirs, photographs, request) -> None:
    """Compares every token of a real photograph, on the native grid and with resized positions."""
    whole, worst = compare(hub, theirs, pixels_of(photographs["chelsea"], side), request)
    assert whole < SAME and worst < SAME


def test_a_meta_file_gives_the_same_at_the_native_size(meta, theirs, photographs, request) -> None:
    """At 518 pixels no position is resized, so the layouts must agree."""
    whole, worst = compare(meta, theirs, pixels_of(photographs["chelsea"], 518), request)
    assert whole < SAME and worst < SAME


def test_a_meta_file_follows_metas_rule_elsewhere(meta, theirs, photographs, request) -> None:
    """At 224 pixels Meta's positions differ from transformers' by about one per cent."""
    whole, _ = compare(meta, theirs, pixels_of(photographs["chelsea"], 224), request)
    assert 1e-3 < whole < 5e-2


def cubic_weights(side: int, count: int, factor: float) -> np.ndarray:
    """[count, side]: weight of each of `side` samples in each output; cubic convolution, a = -0.75, repeated edges."""
    a = -0.75
    weights = np.zeros((count, side))
    for i in range(count):
        at = (i + 0.5) / factor - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            x = abs(at - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(tap, 0), side - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize("grid", [(16, 16), (32, 48), (7, 50)], ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize(("rule", "offset"), [("offset", 0.1), ("size", 0.0)])
def test_positions_are_resized_as_the_formula_says(rule, offset, grid, meta) -> None:
    """Compares with bicubic sampling of the position table in float64, by Meta's rule and by transformers'."""
    table = meta.pos_embed.detach()[:, 1:]
    rows, columns = (cubic_weights(37, n, (n + offset) / 37) for n in grid)
    expected = np.einsum("ir,jc,rcd->ijd", rows, columns, table[0].double().numpy().reshape(37, 37, -1))
    ours = resize_positions(table, grid, rule)[0].double().numpy()
    # float32 sampling positions and sums of 16 terms: some 1e-7 each; 0.1 less in the factor would be 1e-2 or more
    assert np.linalg.norm(ours - expected.reshape(ours.shape)) < SAME * np.linalg.norm(expected)


def test_a_meta_file_has_metas_position_rule(meta, hub) -> None:
    """The layout of the file decides which rule a model follows."""
    assert (meta.config.position_resize, hub.config.position_resize) == ("offset", "size")


def test_fingerprints_do_not_depend_on_the_layout(meta, hub, tmp_path) -> None:
    """The same weights in three layouts have one fingerprint, other weights another."""
    assert meta.fingerprint() == hub.fingerprint()
    assert Backbone.from_pretrained(hub.save_pretrained(tmp_path, "timm")).fingerprint() == hub.fingerprint()
    other = Backbone.from_config(ViTConfig(**vars(hub.config)), seed=0)
    other.load_state_dict(hub.state_dict())
    assert other.fingerprint() == hub.fingerprint()
    with torch.no_grad():
        other.blocks[7].mlp.fc1.weight[3, 5] += 1e-3
    assert other.fingerprint() != hub.fingerprint()


@pytest.fixture(scope="module")
def jpeg(photographs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "chelsea.jpg"
    photographs["chelsea"].save(path, quality=92)
    return path


@torch.no_grad()
def test_from_file_to_features_as_transformers(hub, theirs, jpeg) -> None:
    """One call on a JPEG equals facebook/dinov2-small's published processor and model."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3, image_mean=MEAN,
        image_std=STD, do_center_crop=True, do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True,
    )  # fmt: skip
    output = theirs(torch.as_tensor(np.stack(processor(Image.open(jpeg))["pixel_values"])))
    features = hub.extract_features(jpeg)
    assert features.original_sizes == ((300, 451),) and features.input_size == (224, 224)
    assert relative(features.last_hidden_state, output.last_hidden_state) < SAME
    assert relative(features.pooler_output, output.pooler_output) < SAME


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_crops_of_one_photograph_are_nearer_than_photographs(pooling, fit, hub, photographs) -> None:
    """Two crops of one photograph are always more similar than any two of different photographs."""
    crops = []
    for picture in photographs.values():
        (width, height), (x, y) = picture.size, (picture.width // 10, picture.height // 10)
        crops += [picture.crop((0, 0, width - x, height - y)), picture.crop((x, y, width, height))]
    features = hub.extract_features(crops, fit=fit, pooling=pooling)
    cosines = features.similarity(features)
    photograph = torch.arange(len(crops)) // 2
    same = photograph[:, None] == photograph
    print(f"same photograph at least {cosines[same].min():.3f}, another at most {cosines[~same].max():.3f}")
    assert cosines[same].min() > cosines[~same].max()


def test_a_point_is_found_again_in_a_crop(hub, photographs) -> None:
    """The patch of a point is nearest to the patch of the same point in a crop: `to_patch` is right."""
    distances = []
    for picture in photographs.values():
        x0, y0 = picture.width // 6, picture.height // 8
        whole = hub.extract_features(picture, size=518, fit="native")
        part = hub.extract_features(picture.crop((x0, y0, *picture.size)), size=518, fit="native")
        first, second = (nn.functional.normalize(f.feature_map[0], dim=0) for f in (whole, part))
        for x in range(x0, picture.width, picture.width // 8):
            for y in range(y0, picture.height, picture.height // 8):
                row, column = whole.to_patch(x, y)
                nearest = int(torch.einsum("c,chw->hw", first[:, row, column], second).argmax())
                distances.append(math.dist(divmod(nearest, part.grid[1]), part.to_patch(x - x0, y - y0)))
    median = float(np.median(distances))
    print(f"median distance {median:.2f} patches over {len(distances)} points")
    assert median < 3  # a random patch is about 14 away; large areas of one texture keep it above 0


@pytest.mark.parametrize("mode", ["fast", "int8"])
def test_fewer_bits_keep_their_promise(
    files: tuple[Path, Path], photographs: dict[str, Image.Image], mode: str
) -> None:
    """Tests photographs that calibration does not use, each alone, from the default size to twice that."""
    quick = Backbone.from_pretrained(files[0], device="cpu", mode=mode)  # type: ignore[arg-type]
    quick.extract_features(photographs["chelsea"], size=224)
    if f"mode {mode}" not in quick.extractor.arithmetic:
        pytest.skip(f"this machine has no products for {mode}")
    least = {"fast": (0.9999, 0.999), "int8": (0.99, 0.98)}[mode]
    for side in (224, 336, 448):
        found = [quick.check_precision(picture, size=side) for picture in photographs.values()]
        cls = [one.cls_mean for one in found]
        patches = [one.patch_percentile for one in found]
        print(mode, side, min(cls), min(patches), min(one.patch_worst for one in found))  # noqa: T201
        assert sum(cls) / len(cls) >= least[0] and min(patches) >= least[1]
