"""The vision transformer against a re-implementation in plain tensor algebra; its masks, layers and initial state."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import SMALL, randomise, relative, tokens
from torch import Tensor

from dinov3_infer import Backbone, InputError, VisionTransformer, ViTConfig
from dinov3_infer.errors import InputTypeError, LayerError
from dinov3_infer.model.positions import resize_positions

DINOV3_ALL = replace(SMALL["dinov3_gated"], prefix_norm=True, num_registers=3)  # every option of DINOv3 at once
NAIVE = {"dinov3_all": DINOV3_ALL} | {
    name: SMALL[name] for name in ("dinov3", "dinov3_no_bias", "dinov2_reg", "dinov2_gated", "dino")
}


def model_of(config: ViTConfig, seed: int = 0) -> VisionTransformer:
    return randomise(VisionTransformer(config), seed)  # type: ignore[return-value]


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def naive_attention(x: Tensor, state: dict[str, Tensor], config: ViTConfig, angles: Tensor | None) -> Tensor:
    """x: [N, C] of one image; angles: [N, D/2]."""
    weight, width = state["attn.qkv.weight"], config.embed_dim // config.num_heads
    bias = state.get("attn.qkv.bias", torch.zeros(len(weight), dtype=x.dtype)).clone()
    if not config.key_bias:
        bias[config.embed_dim : 2 * config.embed_dim] = 0
    query, key, value = (x @ weight.T + bias).split(config.embed_dim, dim=1)
    heads = []
    for first in range(0, config.embed_dim, width):
        q, k, v = (part[:, first : first + width] for part in (query, key, value))
        if angles is not None:
            half = width // 2
            turn = torch.polar(torch.ones_like(angles), angles)
            q, k = (
                torch.cat([(turned := torch.complex(part[:, :half], part[:, half:]) * turn).real, turned.imag], dim=1)
                for part in (q, k)
            )
        scores = (q @ k.T / math.sqrt(width)).exp()
        heads.append(scores / scores.sum(1, keepdim=True) @ v)
    return torch.cat(heads, dim=1) @ state["attn.proj.weight"].T + state["attn.proj.bias"]


def naive_ffn(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "mlp.fc1.weight" in state:
        hidden = x @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return hidden @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]
    gate, up = (x @ state["mlp.gate_up.weight"].T + state["mlp.gate_up.bias"]).tensor_split(2, dim=1)
    return (gate / (1 + (-gate).exp()) * up) @ state["mlp.down.weight"].T + state["mlp.down.bias"]


def naive_vit(model: VisionTransformer, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
    """The whole model in float64 from its parameters, one image at a time, [B, N, C] after the final norm."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config, size, results = model.config, model.config.patch_size, []
    height, width = (side // size for side in pixels.shape[2:])
    prefix = 1 + config.num_registers
    angles = None
    if config.position_grid is None:
        angles = torch.zeros(prefix + height * width, config.embed_dim // config.num_heads // 2, dtype=torch.float64)
        periods = state["rope_periods"]
        for row in range(height):
            for column in range(width):
                place = torch.tensor([[(2 * row + 1) / height - 1], [(2 * column + 1) / width - 1]])
                angles[prefix + row * width + column] = (2 * math.pi * place.double() / periods).flatten()
    for b, image in enumerate(pixels.double()):
        patches = []
        for row in range(height):
            for column in range(width):
                window = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten()
                patch = state["patch_embed.proj.weight"].flatten(1) @ window + state["patch_embed.proj.bias"]
                masked = masks is not None and bool(masks[b, row * width + column])
                patches.append(state["mask_token"][0] if masked else patch)
        x = torch.cat([state["cls_token"][0], torch.stack(patches)])
        if config.position_grid is not None:
            x = x + state["pos_embed"][0]  # the grid of the table only
        x = torch.cat([x[:1], state["register_tokens"][0] if config.num_registers else x[:0], x[1:]])
        for i in range(config.depth):
            block = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in state.items()}
            branch = naive_attention(norm(x, block, "norm1", config.norm_eps), block, config, angles)
            x = x + branch * block.get("ls1.gamma", 1.0)
            x = x + naive_ffn(norm(x, block, "norm2", config.norm_eps), block) * block.get("ls2.gamma", 1.0)
        last = norm(x, state, "norm", config.norm_eps)
        if config.prefix_norm:
            last = torch.cat([norm(x[:prefix], state, "cls_norm", config.norm_eps), last[prefix:]])
        results.append(last)
    return torch.stack(results)


@pytest.mark.parametrize(
    ("name", "masked"), [(name, masked) for name, c in NAIVE.items() for masked in (False, True)[: 1 + c.mask_token]]
)
def test_whole_model(name: str, masked: bool) -> None:
    """Two blocks equal the formulas; the mask token replaces patches before positions are added, as in DINOv2."""
    model = model_of(NAIVE[name])
    grid = (3, 4) if model.config.position_grid is None else (model.config.position_grid,) * 2
    pixels = torch.randn(2, 3, *(n * model.patch_size for n in grid))
    masks = torch.rand(2, grid[0] * grid[1]) < 0.4 if masked else None
    expected = naive_vit(model, pixels, masks)
    assert relative(tokens(model(pixels, masks=masks)), expected) < 3e-6  # float32 through two blocks
    model.double()
    # the tables of the rotation stay float32: 1e-7 of an angle; without rotation only float64 rounding is left
    limit = 1e-12 if model.rope_periods is None else 1e-6
    assert relative(tokens(model(pixels.double(), masks=masks)), expected) < limit


def cubic(x: float, a: float) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def sampling(side: int, count: int, rule: str) -> Tensor:
    """Resampling of one axis as a matrix [count, side]."""
    rows = torch.zeros(count, side, dtype=torch.float64)
    for i in range(count):
        if rule == "antialias":  # the kernel widens when shrinking, is cut off at the border and normalised
            factor = side / count
            weights = [cubic((j + 0.5 - (i + 0.5) * factor) / max(factor, 1.0), -0.5) for j in range(side)]
            rows[i] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            continue
        centre = (i + 0.5) * side / (count + (0.1 if rule == "offset" else 0.0)) - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            rows[i, min(max(j, 0), side - 1)] += cubic(centre - j, -0.75)
    return rows


@pytest.mark.parametrize("rule", ["offset", "size", "antialias"])
@pytest.mark.parametrize("grid", [(3, 4), (9, 11), (5, 8)], ids=str)
def test_positions_for_another_grid(rule: Any, grid: tuple[int, int]) -> None:
    """The three rules equal explicit bicubic sampling, for larger and smaller grids."""
    table = torch.randn(1, 49, 6)
    expected = torch.einsum(
        "ia,jb,abc->ijc", sampling(7, grid[0], rule), sampling(7, grid[1], rule), table[0].reshape(7, 7, 6).double()
    )
    resized = resize_positions(table, grid, rule)
    torch.testing.assert_close(resized[0].double(), expected.flatten(0, 1), rtol=0, atol=1e-5)  # float32 weights
    assert resize_positions(table, (7, 7), rule) is table


@pytest.mark.parametrize("name", ["dinov2_reg", "dino"])
def test_resized_positions_are_used(name: str) -> None:
    """On another grid the resized table is added to the patches, and the class token keeps its position."""
    model = model_of(SMALL[name])
    pixels = torch.randn(1, 3, 4 * model.patch_size, 7 * model.patch_size)
    stream = model.embed_tokens(pixels)
    positions = resize_positions(model.pos_embed[:, 1:], (4, 7), model.config.position_resize)
    patches = model.patch_embed(pixels) + positions
    assert torch.equal(stream[:, model.num_prefix_tokens :], patches)
    assert torch.equal(stream[:, 0], model.cls_token[:, 0] + model.pos_embed[:, 0])


@pytest.mark.parametrize(
    "masks",
    [torch.zeros(2, 5) > 0, torch.zeros(1, 6) > 0, torch.zeros(2, 6), torch.zeros(2, 2, 3) > 0],
    ids=["patches", "batch", "dtype", "dimensions"],
)  # fmt: skip
def test_wrong_masks_are_refused(masks: Tensor) -> None:
    """The error has the expected shape, and the given shape and dtype."""
    model = model_of(SMALL["dinov3"])
    with pytest.raises(InputError, match=r"masks must be bool \[2, 6\].*torch\.(bool|float32) \["):
        model(torch.randn(2, 3, 32, 48), masks=masks)


def test_masks_need_a_mask_token() -> None:
    """DINO v1 has no mask token; with a mask token, masks of False change nothing."""
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(InputError, match="no mask token"):
        model_of(SMALL["dino"])(pixels, masks=torch.zeros(1, 16, dtype=torch.bool))
    model = model_of(SMALL["dinov3"])
    plain, masked = model(pixels), model(pixels, masks=torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(tokens(plain), tokens(masked))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [3]), (3, [1, 2, 3]), ([2, 0], [2, 0]), ([-1, 1, -1], [3, 1, 3]), ((), []), (None, []), (range(3), [0, 1, 2])],
    ids=str,
)  # fmt: skip
def test_layers(layers: Any, expected: list[int]) -> None:
    """An int means the last n layers, a list keeps its order and duplicates, -1 is the last; all are normed."""
    model = model_of(replace(DINOV3_ALL, depth=4))
    pixels = torch.randn(2, 3, 32, 48)
    output = model(pixels, layers=layers)
    streams = model.run_blocks(pixels, indices=range(4))[1]
    assert len(output.layers) == len(expected)
    for layer, index in zip(output.layers, expected, strict=True):
        assert torch.equal(tokens(layer), model.normed(streams[index]))
    assert torch.equal(tokens(output), model.normed(streams[3]))
    assert all(relative(streams[i], streams[i + 1]) > 0.01 for i in range(3))


@pytest.mark.parametrize("layers", [0, 3, -1, [2], [0, -3], [5, 0]], ids=str)
def test_layers_that_do_not_exist(layers: Any) -> None:
    """The error has the depth of the model, and is an IndexError too."""
    with pytest.raises(LayerError, match=r"\b2\b") as caught:
        model_of(SMALL["dinov3"])(torch.randn(1, 3, 32, 32), layers=layers)
    assert isinstance(caught.value, IndexError)


def test_key_bias_of_dinov3_does_not_exist() -> None:
    """The key third of the qkv bias has no effect and a zero gradient; the other thirds have an effect."""
    model = model_of(SMALL["dinov3"])
    pixels = torch.randn(1, 3, 32, 48)
    before = tokens(model(pixels))
    (before * torch.randn_like(before)).sum().backward()
    for block in model.blocks:
        query, key, value = block.attn.qkv.bias.grad.chunk(3)
        assert (query != 0).all()
        assert (key == 0).all()
        assert (value != 0).all()
        block.attn.qkv.bias.data[64:128] = 1e3
    assert torch.equal(tokens(model(pixels)), before)


def test_key_bias_is_live_where_the_config_has_one() -> None:
    """With key_bias and RoPE the key third has an effect."""
    model = model_of(replace(SMALL["dinov3"], key_bias=True))
    pixels = torch.randn(1, 3, 32, 48)
    before = tokens(model(pixels))
    model.blocks[0].attn.qkv.bias.data[64:128] += 1
    assert relative(tokens(model(pixels)), before) > 1e-3


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "match"),
    [
        ((1, 3, 33, 48), torch.float32, InputError, "33x48 is not a multiple of the patch size 16.*nearest is 32x48"),
        ((1, 3, 8, 24), torch.float32, InputError, "8x24 .*nearest is 16x32"),
        ((1, 3, 0, 16), torch.float32, InputError, "0x16"),
        ((1, 1, 32, 32), torch.float32, InputError, r"\[B, 3, height, width\], got \[1, 1, 32, 32\]"),
        ((3, 32, 32), torch.float32, InputError, r"got \[3, 32, 32\]"),
        ((1, 3, 32, 32), torch.uint8, InputTypeError, "got torch.uint8; use extract_features"),
    ],
    ids=["remainder", "small", "empty", "grey", "no_batch", "uint8"],
)  # fmt: skip
def test_wrong_pixels_are_refused(shape: tuple[int, ...], dtype: torch.dtype, error: type, match: str) -> None:
    """The error has the given size and the nearest that fits."""
    with pytest.raises(error, match=match):
        model_of(SMALL["dinov3"])(torch.zeros(shape, dtype=dtype))


def test_initial_weights() -> None:
    """Linear layers, tokens and positions N(0, 0.02), biases and mask token 0, norms 1 and 0, layer scales 1e-5."""
    config = replace(SMALL["dinov2_reg"], embed_dim=192, ffn_dim=768, position_grid=16, prefix_norm=True)
    for name, p in Backbone.from_config(config, seed=0).named_parameters():
        if "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("gamma"):
            assert (p == 1e-5).all(), name
        elif name.startswith("patch_embed"):
            bound = (3 * 14 * 14) ** -0.5  # torch's own: uniform in 1/sqrt(inputs)
            assert 0.95 * bound < p.abs().max() <= bound, name
        elif name == "mask_token" or name.endswith("bias"):
            assert not p.any(), name
        else:
            few = name in ("cls_token", "register_tokens")  # 192 and 768 draws: the spread is known to 5 and 2.6 %
            assert p.std().item() == pytest.approx(0.02, rel=0.16 if few else 0.02), name
            assert abs(p.mean().item()) < 4 * 0.02 / p.numel() ** 0.5, name


def test_seeds() -> None:
    """The seed decides the weights, and torch's global generator does not change."""
    before = torch.get_rng_state()
    a, b, c = (Backbone.from_config(SMALL["dinov3"], seed=seed).fingerprint() for seed in (1, 1, 2))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), before)
    assert Backbone.from_config(SMALL["dinov3"]).fingerprint() != a
    assert not torch.equal(torch.get_rng_state(), before)


def test_names_of_parameters() -> None:
    """Meta's names, except the registers and the gated FFN; strict both ways."""
    model = model_of(replace(DINOV3_ALL, local_cls_norm=True))
    names = set(model.state_dict())
    rest = {name for name in names if not name.startswith("blocks.")}
    assert rest == {
        "cls_token", "register_tokens", "mask_token", "rope_periods",
        "patch_embed.proj.weight", "patch_embed.proj.bias",
        *(f"{norm}.{kind}" for norm in ("norm", "cls_norm", "local_cls_norm") for kind in ("weight", "bias")),
    }  # fmt: skip
    linears = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.gate_up", "mlp.down")
    block = {"ls1.gamma", "ls2.gamma", *(f"{part}.{kind}" for part in linears for kind in ("weight", "bias"))}
    assert names - rest == {f"blocks.{i}.{name}" for i in range(2) for name in block}
    assert {"blocks.0.mlp.fc1.weight", "pos_embed"} < set(VisionTransformer(SMALL["dinov2"]).state_dict())
    other = model_of(model.config, seed=1)
    pixels = torch.randn(1, 3, 32, 32)
    assert not torch.equal(tokens(other(pixels)), tokens(model(pixels)))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(tokens(other(pixels)), tokens(model(pixels)))
    with pytest.raises(RuntimeError, match="rope_periods"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "rope_periods"})


def test_heads_must_divide_the_width() -> None:
    """An impossible config is refused at construction."""
    for width, heads, grid in ((64, 3, None), (60, 10, None), (64, 3, 5)):
        with pytest.raises(InputError, match=f"embed_dim {width} .* {heads} heads"):
            ViTConfig(width, 2, heads, 128, position_grid=grid)
    ViTConfig(60, 2, 10, 128, position_grid=5)  # a head of 6 channels cannot turn, but learned positions need no turn


@pytest.mark.parametrize("name", ["dinov3", "dinov2_reg", "dino"])
def test_a_model_from_the_meta_device_is_whole_after_init(name: str) -> None:
    """`to_empty` leaves arbitrary values; `init_weights` writes every tensor of the model."""
    with torch.device("meta"):
        model = VisionTransformer(SMALL[name])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if name == "dinov3":
        assert torch.equal(model.rope_periods, VisionTransformer(SMALL[name]).rope_periods)
