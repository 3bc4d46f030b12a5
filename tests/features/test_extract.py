"""`extract_features`: its results, pooling, reproducibility and errors."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL, randomise, relative
from pictures import complaint

from dinov3_infer import Backbone, Features, ViTConfig
from dinov3_infer.errors import ImageError, InputError, InputTypeError, LayerError, PrecisionError
from dinov3_infer.features.result import pool

WIDTH, REGISTERS, DEPTH = 64, 4, 2
NEAR = dict(rtol=0, atol=1e-5)  # the plan rounds differently


def backbone(config: ViTConfig | None = None) -> Backbone:
    model = randomise(Backbone.from_config(config or ViTConfig(WIDTH, DEPTH, 4, 128)))
    assert isinstance(model, Backbone)
    return model


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return backbone()


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- results ------------------------------------------------------------------------------------------------------


def test_every_field_has_its_shape_and_dtype(bb) -> None:
    """Two images at 64 x 96 pixels: tokens, grid, sizes and the other views of them."""
    f = bb.extract_features([picture(), picture(31, 44)], size=(64, 96), layers=[0, -1])
    assert f.embedding.shape == f.cls_token.shape == (2, WIDTH)
    assert f.register_tokens.shape == (2, REGISTERS, WIDTH) and f.patch_tokens.shape == (2, 24, WIDTH)
    assert f.grid == (4, 6) and f.input_size == (64, 96) and f.original_sizes == ((60, 90), (31, 44)) and len(f) == 2
    assert f.valid is None and len(f.placements) == 2
    assert torch.equal(f.feature_map[1, :, 3, 2], f.patch_tokens[1, 3 * 6 + 2])
    assert f.feature_map.shape == (2, WIDTH, 4, 6) and f.feature_map.data_ptr() == f.patch_tokens.data_ptr()
    assert torch.equal(f.last_hidden_state, torch.cat((f.cls_token[:, None], f.register_tokens, f.patch_tokens), 1))
    assert f.pooler_output is f.cls_token and torch.equal(f.embedding, f.cls_token)
    tensors = (f.embedding, f.cls_token, f.register_tokens, f.patch_tokens)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)
    arrays = f.numpy()
    assert set(arrays) == {"embedding", "cls_token", "register_tokens", "patch_tokens", "feature_map", "layers"}
    assert all(np.array_equal(arrays[name], getattr(f, name).numpy()) for name in arrays if name != "layers")


def test_features_are_the_models_on_preprocessed_pixels(bb) -> None:
    """The fields hold what the plain model gives for the transformed pixels."""
    pictures = [picture(), picture(31, 44)]
    f = bb.extract_features(pictures, size=64, layers=2)
    output = bb(bb.preprocess.with_options(64).batch(pictures).pixels, layers=2)
    for a, b in ((f, output), *zip(f.layers, output.layers, strict=True)):
        for name in ("cls_token", "register_tokens", "patch_tokens"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), **NEAR)


def test_a_model_without_registers_has_none(bb) -> None:
    """`register_tokens` is then an empty tensor, so code that concatenates works for every model."""
    f = backbone(SMALL["dinov2"]).extract_features(picture(), size=70)
    assert f.register_tokens.shape == (1, 0, WIDTH) and f.last_hidden_state.shape == (1, 26, WIDTH)


@pytest.mark.parametrize(
    ("layers", "indices"),
    [(None, []), (1, [1]), (2, [0, 1]), ([0], [0]), ([-1], [1]), ((1, 0), [1, 0]), ([0, 0], [0, 0]), ([], [])],
)
def test_layers_come_as_asked_for(layers, indices, bb) -> None:
    """An int takes the last n layers, a list takes these layers in this order; all are after the final norm."""
    f = bb.extract_features(picture(), size=(32, 48), layers=layers)
    pixels = bb.preprocess.with_options((32, 48))(picture())[None]
    kept = [bb.normed(bb.run_blocks(pixels, indices=[i])[1][i]) for i in indices]
    assert len(f.layers) == len(indices)
    for layer, tokens in zip(f.layers, kept, strict=True):
        found = torch.cat((layer.cls_token[:, None], layer.register_tokens, layer.patch_tokens), dim=1)
        torch.testing.assert_close(found, tokens, **NEAR)
        assert layer.grid == (2, 3)
        assert torch.equal(layer.feature_map[0, :, 1, 2], layer.patch_tokens[0, 5])
    if indices and indices[-1] == 1:
        assert torch.equal(f.layers[-1].patch_tokens, f.patch_tokens)


def test_pooling_takes_cls_mean_or_both(bb) -> None:
    """ "mean" averages only patches; "cls_mean" has the class token first."""
    pictures = [picture(), picture(seed=1)]
    f = {name: bb.extract_features(pictures, size=64, pooling=name) for name in ("cls", "mean", "cls_mean")}
    mean = f["cls"].patch_tokens.double().mean(dim=1)
    assert torch.equal(f["cls"].embedding, f["cls"].cls_token)
    assert relative(f["mean"].embedding, mean) < 1e-6  # one float32 sum
    assert torch.equal(f["cls_mean"].embedding, torch.cat((f["cls"].embedding, f["mean"].embedding), dim=-1))


def test_the_mean_leaves_padding_out(bb) -> None:
    """With `fit="pad"` the mean covers only patches of the image, whatever the padding patches hold."""
    f = bb.extract_features([picture(40, 120), picture(120, 40)], size=96, fit="pad", pooling="mean")
    assert f.valid is not None and f.valid.sum(dim=(1, 2)).tolist() == [12, 12] and f.grid == (6, 6)
    assert f.valid[0, :2].all() and f.valid[1, :, :2].all()
    for i in range(2):
        assert relative(f.embedding[i], f.patch_tokens[i, f.valid[i].flatten()].double().mean(dim=0)) < 1e-6
    poisoned = torch.where(f.valid.flatten(1)[..., None], f.patch_tokens, 1e6)
    assert relative(pool(f.cls_token, poisoned, "mean", f.valid), f.embedding) < 1e-6


def test_similarity_is_the_cosine(bb) -> None:
    """Every image is compared with every other; normalize() gives length 1."""
    a = bb.extract_features([picture(seed=i) for i in range(3)], size=32)
    b = bb.extract_features(picture(seed=1), size=64)
    expected = F.cosine_similarity(a.embedding[:, None].double(), b.embedding[None].double(), dim=-1)
    assert a.similarity(b).shape == (3, 1) and (a.similarity(b) - expected).abs().max() < 1e-6
    assert (a.normalize().embedding.norm(dim=-1) - 1).abs().max() < 1e-6
    both = bb.extract_features(picture(), size=32, pooling="cls_mean")
    assert "pooling" in complaint(InputError, lambda: a.similarity(both))


@pytest.mark.parametrize(
    ("fit", "size"),
    [("squash", 96), ("squash", (64, 160)), ("crop", 96), ("crop", (96, 64)), ("pad", 96),
     ("native", 96), ("native", None)],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(150, 100), (90, 310), (64, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_to_patch_finds_the_patch_that_holds_a_pixel(shape, fit, size, bb) -> None:
    """For a bright square at each position, `to_patch` names the brightest patch of the input."""
    (height, width), found = shape, 0
    corners = [(4, 4), (width - 5, 4), (4, height - 5), (width - 5, height - 5)]
    for x, y in [*corners, (width // 2, height // 2), (width // 3, height // 4)]:
        scene = np.zeros((height, width, 3), np.uint8)
        scene[y - 1 : y + 2, x - 1 : x + 2] = 255
        transform = bb.preprocess.with_options(size, fit)
        batch = transform.batch([scene])
        f = Features(*[torch.zeros(1)] * 4, tuple(n // 16 for n in batch.pixels.shape[2:]), batch.placements)
        light = F.avg_pool2d(batch.pixels[:, :1] * 0.229 + 0.485, 16)[0, 0]
        if fit == "pad":
            light = torch.where(batch.valid[0], light, 0.0)
        try:
            row, column = f.to_patch(x + 0.5, y + 0.5)
        except InputError as error:
            assert fit == "crop" and "cropped away" in str(error) and light.max() < 0.02
            continue
        found += 1
        assert light[row, column] > 0.5 * light.max() > 0.0005  # a square on an edge is shared by two patches
    assert found >= (1 if fit == "crop" else 6)


@pytest.mark.parametrize(("x", "y"), [(-1, 5), (90, 5), (5, 60), (5, -0.1)])
def test_points_outside_the_image_are_refused(x, y, bb) -> None:
    """The message gives the point and the size of the image."""
    text = complaint(InputError, lambda: bb.extract_features(picture(), size=32).to_patch(x, y))
    assert f"x={x:g}" in text and "90 wide" in text


# --- side effects ------------------------------------------------------------------------------------------------


def test_results_can_be_trained_on() -> None:
    """Results are not inference tensors: a linear probe trains on them, and no gradient reaches the backbone."""
    bb = backbone()
    f = bb.extract_features([picture(seed=i) for i in range(8)], size=32, layers=1)
    assert not any(t.requires_grad or t.is_inference() for t in (f.embedding, f.patch_tokens, f.layers[0].cls_token))
    probe, labels = torch.nn.Linear(WIDTH, 2), torch.arange(8) % 2
    optimiser = torch.optim.Adam(probe.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(probe(f.embedding), labels)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.1 * losses[0] and all(p.grad is None for p in bb.parameters())
    f.embedding.add_(1.0)  # an in-place change is allowed too


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training) -> None:
    """Flags, weights and gradients do not change, and features do not depend on the training flag."""
    bb = backbone().train(training)
    bb.blocks[0].requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in bb.named_parameters()}
    embedding = bb.extract_features(picture(), size=32).embedding
    assert all(module.training is training for module in bb.modules()) and torch.is_grad_enabled()
    for name, p in bb.named_parameters():
        assert p.requires_grad is before[name][0] and torch.equal(p, before[name][1]) and p.grad is None
    assert torch.equal(embedding, backbone().extract_features(picture(), size=32).embedding)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}_threads")
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("side", [1, 3, 8], ids=lambda n: f"{n}x{n}_patches")
@pytest.mark.parametrize("name", SMALL)
def test_one_image_gives_one_vector(name, side, threads) -> None:
    """On a CPU the vector is equal bit for bit, alone and at every position in batches of 2 to 8."""
    bb = backbone(SMALL[name])
    size = side * bb.patch_size
    alone = bb.extract_features(picture(), size=size).last_hidden_state[0]
    for count in (2, 3, 5, 8):
        for position in {0, count // 2, count - 1}:
            batch = [picture(seed=1 + i) for i in range(count)]
            batch[position] = picture()
            together = bb.extract_features(batch, size=size).last_hidden_state[position]
            far = float((together - alone).abs().max())
            assert far == 0, f"off by {far:.1e} at {position} in a batch of {count}"


# --- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(size=250), "nearest is 256"), (dict(size=(250, 64)), "(256, 64)"), (dict(size=-1), "-1"),
        (dict(size=0), "0"), (dict(fit="stretch"), "'stretch'"), (dict(pooling="max"), "'max'"),
        (dict(pooling=None), "None"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_said(options, said, bb) -> None:
    """The message gives the wrong value and the valid ones."""
    assert said in complaint(InputError, lambda: bb.extract_features(picture(), **options))


@pytest.mark.parametrize(
    "empty", [[], (), iter([]), np.zeros((0, 8, 8, 3), np.uint8)], ids=["list", "tuple", "iterator", "array"]
)
def test_no_images_are_said(empty, bb) -> None:
    """An empty input raises one sentence."""
    assert "at least one" in complaint(InputError, lambda: bb.extract_features(empty))


@pytest.mark.parametrize("layers", [0, 3, -1, [2], [0, 99], [-3]], ids=str)
def test_layers_that_do_not_exist_are_said(layers, bb) -> None:
    """The error is an IndexError that gives the valid numbers."""
    text = complaint(LayerError, lambda: bb.extract_features(picture(), size=32, layers=layers))
    number = layers if isinstance(layers, int) else layers[-1]
    assert issubclass(LayerError, IndexError) and str(number) in text
    assert ("has 2 (0..1 or -2..-1)" in text) if isinstance(layers, list) else ("1 to 2" in text)


def test_mixed_sizes_with_native_are_said(bb) -> None:
    """The message gives the grids and a remedy; images of different sizes with equal grids are accepted."""
    text = complaint(InputError, lambda: bb.extract_features([picture(64, 64), picture(64, 96)], fit="native"))
    assert "4x4" in text and "4x6" in text and "fit='squash'" in text
    assert bb.extract_features([picture(64, 64), picture(60, 66)], fit="native").grid == (4, 4)


def test_a_large_image_without_a_size_is_said(bb) -> None:
    """Without `size`, a side above 4096 pixels raises an error that counts the patches; with `size` it is accepted."""
    large = np.zeros((160, 4112, 3), np.uint8)
    text = complaint(InputError, lambda: bb.extract_features([picture(160, 160), large], fit="native"))
    assert "item 1" in text and "160x4112" in text and "2,570 patches" in text and "size=" in text
    assert bb.extract_features(large, fit="native", size=411).grid == (1, 26)


def test_wrong_images_are_said(bb) -> None:
    """The message gives the number of the item, and the error has the expected classes."""
    assert "item 1" in complaint(ImageError, lambda: bb.extract_features([picture(), picture()[..., :2]]))
    assert "int" in complaint(InputTypeError, lambda: bb.extract_features(5))


def test_forward_takes_normalised_floats_in_whole_patches(bb) -> None:
    """uint8 raises a TypeError, another size an error with the nearest valid size; both name the right method."""
    text = complaint(TypeError, lambda: bb(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
    assert "uint8" in text and "extract_features" in text
    text = complaint(InputError, lambda: bb(torch.zeros(1, 3, 250, 333)))
    assert re.search(r"250x333.*256x336", text) and "fit='native'" in text
    for shape in [(1, 3, 8, 32), (1, 3, 0, 32), (3, 32, 32), (1, 4, 32, 32), (1, 3, 32)]:
        complaint(InputError, lambda shape=shape: bb(torch.zeros(shape)))


# --- lower precision ----------------------------------------------------------------------------------------------


def cosine(a: Features, b: Features) -> float:
    """The smallest cosine over all tokens."""
    return float(F.cosine_similarity(a.last_hidden_state.double(), b.last_hidden_state.double(), dim=-1).min())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outliers_above_float16_in_the_stream_are_kept(dtype, tmp_path) -> None:
    """Registers of 1e5, as in the large models, exceed float16; the float32 residual stream keeps them."""
    model = backbone()
    with torch.no_grad():
        model.register_tokens[:, 1] = 1e5 * model.register_tokens[:, 1].sign()
    directory = model.save_pretrained(tmp_path / "model")
    exact, lower = (Backbone.from_pretrained(directory, dtype=d, device="cpu") for d in (torch.float32, dtype))
    assert lower.blocks[0].mlp.fc1.weight.dtype == dtype and float(lower.register_tokens.detach().abs().max()) == 1e5
    f, g = exact.extract_features(picture(), size=64), lower.extract_features(picture(), size=64)
    assert cosine(f, g) > 0.999 and g.embedding.dtype == torch.float32
    pixels = exact.preprocess.with_options(64).batch([picture()]).pixels
    assert torch.equal(lower(pixels).patch_tokens, g.patch_tokens) and lower(pixels).cls_token.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "gated"])
@pytest.mark.parametrize("block", range(DEPTH))
def test_overflow_in_the_ffn_is_never_silent(block, gated, dtype, tmp_path) -> None:
    """Activations above 65504 in the FFN give right features if the dtype holds them, else PrecisionError."""
    model = backbone(ViTConfig(WIDTH, DEPTH, 4, 128, gated=gated))
    into, out = list(model.blocks[block].mlp.children())
    with torch.no_grad():
        into.weight[7] *= 3e5
        out.weight[:, 7] /= 3e5
    directory = model.save_pretrained(tmp_path / "model")
    exact, lower = (Backbone.from_pretrained(directory, dtype=d, device="cpu") for d in (torch.float32, dtype))
    f = exact.extract_features(picture(), size=64)
    try:
        g = lower.extract_features(picture(), size=64)
    except PrecisionError as error:
        assert dtype == torch.float16 and "float16" in str(error) and "float32" in str(error)
    else:
        assert dtype == torch.bfloat16 and cosine(f, g) > 0.999


def test_float16_is_warned_about_and_checked_after_half(tmp_path, caplog) -> None:
    """Loading in float16 logs one line; after `half()`, infinite registers raise an error."""
    model = backbone()
    Backbone.from_pretrained(model.save_pretrained(tmp_path / "model"), dtype="float16", device="cpu")
    assert [r.levelname for r in caplog.records if "float16" in r.message] == ["WARNING"]
    with torch.no_grad():
        model.register_tokens[:, 1] = 1e5
    text = complaint(PrecisionError, lambda: model.half().extract_features(picture(), size=64))
    assert "float16" in text and issubclass(PrecisionError, FloatingPointError)


@pytest.mark.parametrize(
    "cast",
    [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)],
    ids=["half", "bfloat16", "to"],
)
def test_casting_leaves_the_rope_periods_float32(cast) -> None:
    """The features stay close; rounded periods would change every patch."""
    model, exact = backbone(), backbone()
    cast(model)
    assert model.cls_token.dtype != torch.float32 and model.rope_periods.dtype == torch.float32
    assert torch.equal(model.rope_periods, exact.rope_periods)
    # two blocks of bfloat16 products; random weights of unit gain
    assert cosine(model.extract_features(picture(), size=64), exact.extract_features(picture(), size=64)) > 0.999
