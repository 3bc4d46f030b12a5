"""Rotary position embedding: published values, an independent definition, its invariances and its random changes."""

import math

import numpy as np
import pytest
import torch
from oracles import PUBLISHED_PERIODS
from torch import Tensor

from dinov3_infer import InputError, RopeAugmentation
from dinov3_infer.model.rope import apply_rope, augment_coordinates, rope_coordinates, rope_periods, rope_table

GRIDS = [(1, 1), (2, 3), (14, 14), (5, 32), (40, 1)]
GOLDEN = 5e-6  # the published values come from float32 runs and are printed with 7 or 8 digits


def angles_of(grid: tuple[int, int], head_dim: int) -> np.ndarray:
    """The angle of every channel pair by definition, one number at a time, [P, D/2] float64."""
    height, width = grid
    rows = []
    for y in range(height):
        for x in range(width):
            centre = (2 * (y + 0.5) / height - 1, 2 * (x + 0.5) / width - 1)
            rows.append([2 * math.pi * c / 100 ** (4 * i / head_dim) for c in centre for i in range(head_dim // 4)])
    return np.array(rows)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_golden_values_of_a_small_grid() -> None:
    """Tokens 0 and 4 of a 2x3 grid have the angles of the reference implementation."""
    cos, sin = rope_table((2, 3), rope_periods(64))
    expected = {
        (0, 0): (-1.0, 8.74e-8), (0, 1): (-0.70687175, -0.70734173), (0, 2): (-0.19460146, -0.98088241),
        (0, 16): (None, 0.86602521), (0, 17): (None, -0.00044361), (0, 18): (None, -0.70757681),
        (4, 1): (-0.70687175, 0.70734173), (4, 17): (1.0, 0.0),
    }  # fmt: skip
    for place, (c, s) in expected.items():
        assert sin[place].item() == pytest.approx(s, abs=GOLDEN)
        assert c is None or cos[place].item() == pytest.approx(c, abs=GOLDEN)


def test_golden_sums_of_a_square_grid() -> None:
    """Sums over 14x14 patches; the reference holds every angle twice, once for each channel of its pair."""
    cos, sin = (t.double() for t in rope_table((14, 14), rope_periods(64)))
    assert 2 * cos.sum().item() == pytest.approx(8257.640, rel=GOLDEN)
    assert 2 * sin.abs().sum().item() == pytest.approx(4631.238, rel=GOLDEN)
    assert sin.sum().item() == pytest.approx(0, abs=1e-3)  # 6272 float32 sines, each off by 1e-7 at most


@pytest.mark.parametrize("grid", GRIDS)
def test_coordinates(grid: tuple[int, int]) -> None:
    """Patch centres, row first, each axis over [-1, 1] by its own length."""
    height, width = grid
    expected = [(2 * (y + 0.5) / height - 1, 2 * (x + 0.5) / width - 1) for y in range(height) for x in range(width)]
    np.testing.assert_allclose(rope_coordinates(grid).numpy(), expected, rtol=0, atol=1e-7)  # float32 rounding below 1


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("grid", GRIDS)
def test_table_is_its_definition(grid: tuple[int, int], head_dim: int) -> None:
    """cos and sin of 2 pi c / 100^(4i/D), with rows in the first half of the pairs and columns in the second."""
    cos, sin = rope_table(grid, rope_periods(head_dim))
    angles = angles_of(grid, head_dim)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (grid[0] * grid[1], head_dim // 2)
    # float32 angles up to 2 pi carry an error of a few times 2.4e-7
    np.testing.assert_allclose(cos.numpy(), np.cos(angles), rtol=0, atol=1.5e-6)
    np.testing.assert_allclose(sin.numpy(), np.sin(angles), rtol=0, atol=1.5e-6)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_rows_are_the_identity(prefix: int) -> None:
    """Class and register tokens do not rotate, with or without augmentation, and do not change the rows of patches."""
    periods = rope_periods(64)
    plain, changed = (
        rope_table((3, 4), periods, prefix, augmentation, seeded(1))
        for augmentation in (None, RopeAugmentation(0.5, 1.5, 2.0))
    )
    for cos, sin in (plain, changed):
        assert cos.shape == (prefix + 12, 32)
        assert torch.equal(cos[:prefix], torch.ones(prefix, 32))
        assert torch.equal(sin[:prefix], torch.zeros(prefix, 32))
    cos, sin = rope_table((3, 4), periods)
    assert torch.equal(plain[0][prefix:], cos)
    assert torch.equal(plain[1][prefix:], sin)


@pytest.mark.parametrize(("head_dim", "second", "last"), [(64, 1.33352, 74.989), (128, 1.15478, 86.596)])
def test_periods(head_dim: int, second: float, last: float) -> None:
    """Powers of 100 from 1, D/4 of them, float32 for any default dtype."""
    periods = rope_periods(head_dim)
    expected = [100 ** (4 * i / head_dim) for i in range(head_dim // 4)]
    np.testing.assert_allclose(periods.numpy(), expected, rtol=5e-7)  # a few float32 steps of a power
    assert periods[0] == 1
    assert periods[1].item() == pytest.approx(second, rel=1e-5)  # printed with 6 digits
    assert periods[-1].item() == pytest.approx(last, rel=1e-5)
    torch.set_default_dtype(torch.float64)
    try:
        assert rope_periods(head_dim).dtype == torch.float32
        assert rope_table((2, 2), periods)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_base() -> None:
    """The base is the period for the exponent 1."""
    assert rope_periods(16, base=16.0).tolist() == [1.0, 2.0, 4.0, 8.0]


def test_bfloat16_periods_are_those_of_the_released_files() -> None:
    """Rounding the exact periods to bfloat16 gives the sixteen numbers that Meta's files hold, bit for bit."""
    assert tuple(rope_periods(64).bfloat16().tolist()) == PUBLISHED_PERIODS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rotation(dtype: torch.dtype) -> None:
    """Pair k is (channel k, channel k + D/2), rotated as a complex number in float32 at least."""
    x = torch.randn(2, 11, 3, 16, dtype=torch.float64).to(dtype)
    cos, sin = rope_table((2, 5), rope_periods(16), 1)
    turned = apply_rope(x, cos, sin)
    wide = x.double().numpy()
    factor = (cos.double().numpy() + 1j * sin.double().numpy())[:, None]
    product = (wide[..., :8] + 1j * wide[..., 8:]) * factor
    expected = torch.from_numpy(np.concatenate([product.real, product.imag], axis=-1))
    assert turned.dtype == dtype
    # one rounding to the dtype of x at the end, after two products and a sum in float32 or float64
    wide_step = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    length = torch.from_numpy(np.tile(np.abs(product), 2))
    assert (
        (turned.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 2 * wide_step * length
    ).all()


def test_rotation_leaves_prefix_tokens_untouched() -> None:
    """Identity rows return the same bits, also in bfloat16."""
    x = torch.randn(1, 9, 2, 16).bfloat16()
    assert torch.equal(apply_rope(x, *rope_table((2, 2), rope_periods(16), 5))[:, :5], x[:, :5])


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rotation_preserves_norms(head_dim: int) -> None:
    """A rotation changes no length, neither of the vector nor of a pair."""
    x = torch.randn(4, 30, 2, head_dim, dtype=torch.float64)
    turned = apply_rope(x, *rope_table((5, 6), rope_periods(head_dim)))
    pairs, turned_pairs = (t.unflatten(-1, (2, head_dim // 2)).norm(dim=-2) for t in (x, turned))
    torch.testing.assert_close(turned_pairs, pairs, rtol=2e-7, atol=0)  # cos^2 + sin^2 of float32 tables


def test_scores_depend_on_differences_only() -> None:
    """A query and a key give the same score at all positions with the same difference of rows and columns."""
    height, width, head_dim = 4, 6, 64
    query, key = torch.randn(2, head_dim, dtype=torch.float64)
    cos, sin = rope_table((height, width), rope_periods(head_dim))
    turned = [apply_rope(v.expand(height * width, 1, head_dim), cos, sin)[:, 0] for v in (query, key)]
    scores = (turned[0] @ turned[1].T).reshape(height, width, height, width)
    limit = 2e-6 * float(query.norm() * key.norm())  # two float32 angles, each off by a few times 2.4e-7
    seen: dict[tuple[int, int], float] = {}
    for y in range(height):
        for x in range(width):
            for v in range(height):
                for u in range(width):
                    score = scores[y, x, v, u].item()
                    assert abs(score - seen.setdefault((v - y, u - x), score)) < limit
    assert len({round(score, 3) for score in seen.values()}) > 60  # of 77 differences: they do matter


def test_axes_do_not_mix() -> None:
    """The first half of the pairs does not depend on the column, the second does not depend on the row."""
    for table in rope_table((4, 6), rope_periods(64)):
        grid = table.reshape(4, 6, 2, 16)
        assert torch.equal(grid[:, :, 0], grid[:, :1, 0].expand(4, 6, 16))
        assert torch.equal(grid[:, :, 1], grid[:1, :, 1].expand(4, 6, 16))


def test_augmentation_without_steps_changes_nothing() -> None:
    """Without steps the table is the same, and no number is drawn."""
    generator = seeded(3)
    before = generator.get_state()
    changed = rope_table((3, 5), rope_periods(64), 2, RopeAugmentation(), generator)
    assert all(torch.equal(a, b) for a, b in zip(changed, rope_table((3, 5), rope_periods(64), 2), strict=True))
    assert torch.equal(generator.get_state(), before)


def test_augmentation_order_is_shift_jitter_rescale() -> None:
    """Each step acts on the previous result: leaving out later steps does not change earlier draws."""
    coordinates = rope_coordinates((3, 5)).double()
    steps = [RopeAugmentation(0.3), RopeAugmentation(0.3, 1.5), RopeAugmentation(0.3, 1.5, 2.0)]
    shifted, jittered, rescaled = (augment_coordinates(coordinates, step, seeded(7)) for step in steps)

    def constant(ratio: Tensor) -> Tensor:  # the factor of each axis, [2], after proof that it is one number
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
        return ratio[0]

    shift = shifted - coordinates
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-7)
    jitter, rescale = constant(jittered / shifted), constant(rescaled / jittered)
    assert shift[0, 0] != shift[0, 1]
    assert jitter[0] != jitter[1]
    assert rescale[0] == pytest.approx(rescale[1].item(), rel=1e-6)
    assert rescale[0] != 1


@pytest.mark.parametrize("step", ["shift", "jitter", "rescale"])
def test_augmentation_distribution(step: str) -> None:
    """Shift is uniform in [-s, s], jitter and rescale log-uniform in [1/x, x]: mean 0, expected spread and bounds."""
    limit = {"shift": 0.4, "jitter": math.log(1.5), "rescale": math.log(2.0)}[step]
    augmentation = RopeAugmentation(**{step: 0.4 if step == "shift" else math.exp(limit)})
    generator, ones = seeded(11), torch.ones(1, 2)
    changed = torch.cat([augment_coordinates(ones, augmentation, generator) for _ in range(4000)])
    draws = (changed - 1 if step == "shift" else changed.log()).double()
    assert draws.abs().max() <= limit + 1e-6
    assert draws.abs().max() > 0.99 * limit
    error = limit / math.sqrt(3 * 4000)  # of the mean of 4000 uniform draws
    assert (draws.mean(dim=0).abs() < 4 * error).all()
    assert (draws.std(dim=0) * math.sqrt(3) / limit - 1).abs().max() < 0.05  # uniform: limit / sqrt(3); 0.7 % expected
    together = torch.corrcoef(draws.T)[0, 1].item()
    assert together == pytest.approx(1.0 if step == "rescale" else 0.0, abs=0.07)  # 4 / sqrt(4000)


def test_augmentation_follows_its_generator() -> None:
    """The seed decides the table, and one generator never draws the same table twice."""

    def make(generator: torch.Generator) -> Tensor:
        return rope_table((3, 4), rope_periods(64), 1, RopeAugmentation(rescale=2.0), generator)[0]

    generator = seeded(5)
    first, second = make(generator), make(generator)
    assert torch.equal(first, make(seeded(5)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, make(seeded(6)))


def test_augmentation_without_generator_follows_the_global_seed() -> None:
    """torch.manual_seed decides if no generator is given."""
    tables = []
    for _ in range(2):
        torch.manual_seed(4)
        tables.append(rope_table((3, 4), rope_periods(64), 1, RopeAugmentation(shift=0.5))[1])
    assert torch.equal(*tables)


@pytest.mark.parametrize("name", ["jitter", "rescale"])
@pytest.mark.parametrize("value", [0.5, 0.0, -2.0])
def test_wrong_ranges_are_refused(name: str, value: float) -> None:
    """[1/x, x] needs x >= 1; the message names the field and the value."""
    with pytest.raises(InputError, match=rf"rope {name} .*got {value}"):
        RopeAugmentation(**{name: value})
