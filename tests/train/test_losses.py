"""Every loss against a double loop written from its formula, and against values of the published code."""

import math

import pytest
import torch
from torch import Tensor

from dinov3_infer.errors import InputError
from dinov3_infer.train import losses

# --- double loops in plain arithmetic: they import nothing of ours, and autograd differentiates them --------------


def total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()


def naive_log_softmax(row: Tensor) -> list[Tensor]:
    peak = max(float(v.detach()) for v in row)
    norm = total([(v - peak).exp() for v in row]).log() + peak
    return [v - norm for v in row]


def naive_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    rows = [[math.exp(float(v) / temperature) for v in row] for row in logits]
    mass = sum(map(sum, rows))
    rows = [[v / mass for v in row] for row in rows]
    for _ in range(iterations):
        columns = [sum(row[k] for row in rows) for k in range(logits.shape[1])]
        rows = [[v / columns[k] / len(columns) for k, v in enumerate(row)] for row in rows]
        rows = [[v / sum(row) / len(rows) for v in row] for row in rows]
    return torch.tensor([[v * len(rows) for v in row] for row in rows], dtype=torch.float64)


def naive_dino(student: Tensor, teacher: Tensor, ignore_diagonal: bool) -> Tensor:
    terms = []
    for s in range(student.shape[0]):
        for t in range(teacher.shape[0]):
            for b in range(student.shape[1]):
                scores = naive_log_softmax(student[s, b] / 0.1)
                if not (ignore_diagonal and s == t):
                    terms.append(total([-teacher[t, b, k] * scores[k] for k in range(student.shape[2])]))
    return total(terms) / len(terms)


def naive_ibot(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    row, images = 0, []
    for mask in masks:
        terms = []
        for _ in range(int(mask.sum())):
            scores = naive_log_softmax(student[row] / 0.1)
            terms.append(total([-teacher[row, k] * scores[k] for k in range(len(scores))]))
            row += 1
        images.append(total(terms) / len(terms) if terms else student.new_zeros(()))
    return total(images) / len(images)


def naive_koleo(x: Tensor, group: int, neighbours: int) -> Tensor:
    unit = [row / row.norm() for row in x]
    terms = []
    for i, row in enumerate(unit):
        others = [j for j in range(i // group * group, i // group * group + group) if j != i]
        others.sort(key=lambda j: -float((row * unit[j]).sum().detach()))
        for j in others[:neighbours]:
            terms.append(-((row - unit[j] + 1e-8).norm() + 1e-8).log())
    return total(terms) / len(terms)


def naive_sigreg(x: Tensor, slices: Tensor, group: int) -> Tensor:
    statistics = []
    knots = [-3.0 + 6.0 * k / 32 for k in range(33)]  # the whole line, not half of it twice
    for start in range(0, len(x), group):
        for direction in slices.T:
            values = x[start : start + group] @ (direction / direction.norm())
            terms = []
            for k, t in enumerate(knots):
                real = total([(t * v).cos() for v in values]) / group - math.exp(-0.5 * t * t)
                imaginary = total([(t * v).sin() for v in values]) / group
                weight = math.exp(-0.5 * t * t) * (6.0 / 32) * (0.5 if k in (0, 32) else 1.0)
                terms.append(weight * (real**2 + imaginary**2))
            statistics.append(group * total(terms))
    return total(statistics) / len(statistics)


def naive_gram(student: Tensor, teacher: Tensor, of: str, normalise: bool, per_image: bool, negatives: str) -> Tensor:
    terms = []

    def vectors(tokens: Tensor) -> list[list[Tensor]]:
        images = list(tokens) if per_image else [torch.cat(list(tokens))]
        images = [image if of == "patches" else image.T for image in images]
        return [[row / row.norm() if normalise else row for row in image] for image in images]

    for ours, theirs in zip(vectors(student), vectors(teacher), strict=True):
        for i in range(len(ours)):
            for j in range(len(ours)):
                a, b = (ours[i] * ours[j]).sum(), (theirs[i] * theirs[j]).sum()
                if negatives != "keep" and float(b.detach()) < 0:
                    b = b * 0
                if negatives == "remove" and float(a.detach()) < 0:
                    a = a * 0
                terms.append((a - b) ** 2)
    return total(terms) / len(terms)


def naive_feature(student: Tensor, teacher: Tensor) -> Tensor:
    directions, distances = [], []
    for ours, target in zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True):
        directions.append(1 - (ours * target).sum() / (ours.norm() * target.norm()))
        for a, b in zip(ours, target, strict=True):
            d = (a - b).abs()
            distances.append(0.5 * d**2 if float(d.detach()) < 1 else d - 0.5)
    return 0.9 * total(directions) / len(directions) + 0.1 * total(distances) / len(distances)


# --- the cases ---------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(*shape: int, seed: int = 1) -> Tensor:
    return draw(*shape, seed=seed).softmax(-1)


def as_in(x: Tensor, constant: Tensor) -> Tensor:
    """A constant in the dtype that the input is computed in."""
    return constant.to(torch.promote_types(x.dtype, torch.float32))


MASKS = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
GRAM = [
    dict(of=of, normalise=normalise, per_image=per_image, negatives=negatives)
    for of, normalise, per_image, negatives in [
        ("patches", True, True, "keep"),
        ("patches", True, False, "keep"),
        ("patches", False, True, "keep"),
        ("patches", True, True, "remove"),
        ("patches", True, False, "remove"),
        ("patches", True, True, "remove_teacher"),
        ("channels", True, True, "keep"),
        ("channels", False, False, "remove"),
    ]
]
# name, ours, naive; each a function of the one tensor that carries a gradient
CASES = [
    ("dino", draw(3, 4, 5), lambda x: losses.dino_loss(x, as_in(x, shares(2, 4, 5))),
     lambda x: naive_dino(x, shares(2, 4, 5), False)),
    ("dino-off-diagonal", draw(3, 4, 5), lambda x: losses.dino_loss(x, as_in(x, shares(2, 4, 5)), ignore_diagonal=True),
     lambda x: naive_dino(x, shares(2, 4, 5), True)),
    ("ibot", draw(5, 7), lambda x: losses.ibot_loss(x, as_in(x, shares(5, 7)), MASKS),
     lambda x: naive_ibot(x, shares(5, 7), MASKS)),
    ("koleo", draw(6, 8), losses.koleo, lambda x: naive_koleo(x, 6, 1)),
    ("koleo-groups-top2", draw(8, 5), lambda x: losses.koleo(x, group_size=4, neighbours=2),
     lambda x: naive_koleo(x, 4, 2)),
    ("sigreg", draw(6, 4), lambda x: losses.sigreg(x, as_in(x, draw(4, 3, seed=2))),
     lambda x: naive_sigreg(x, draw(4, 3, seed=2), 6)),
    ("sigreg-groups", draw(6, 4), lambda x: losses.sigreg(x, as_in(x, draw(4, 3, seed=2)), group_size=3),
     lambda x: naive_sigreg(x, draw(4, 3, seed=2), 3)),
    ("feature", draw(2, 3, 5, scale=2.0), lambda x: losses.feature_loss(x, as_in(x, draw(2, 3, 5, seed=3))),
     lambda x: naive_feature(x, draw(2, 3, 5, seed=3))),
    *[("gram-" + "-".join(map(str, o.values())), draw(2, 6, 5),
       lambda x, o=o: losses.gram_loss(x, as_in(x, draw(2, 6, 5, seed=4)), **o),
       lambda x, o=o: naive_gram(x, draw(2, 6, 5, seed=4), **o)) for o in GRAM],
]  # fmt: skip


@pytest.mark.parametrize(("x", "ours", "naive"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_against_a_double_loop(x: Tensor, ours, naive) -> None:
    """Values and gradients agree to 1e-9 in float64; values to 1e-5 relative in float32."""
    values = []
    for function in (ours, naive):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        values.append((value, torch.autograd.grad(value, leaf)[0]))
    (value, gradient), (expected, expected_gradient) = values
    assert value.dtype == torch.float64 and float(expected_gradient.abs().max()) > 1e-4
    assert abs(float((value - expected).detach())) < 1e-9
    assert float((gradient - expected_gradient).abs().max()) < 1e-9
    assert float(ours(x.float())) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_against_a_loop(iterations: int) -> None:
    """It equals repeated division in float64, and every row is a distribution."""
    logits = draw(6, 4, scale=0.3)
    ours = losses.sinkhorn_knopp(logits, 0.07, iterations)
    assert float((ours - naive_sinkhorn(logits, 0.07, iterations)).abs().max()) < 1e-9
    assert torch.allclose(ours.sum(1), torch.ones(6, dtype=torch.float64), atol=1e-12)
    single = losses.sinkhorn_knopp(logits.float(), 0.07, iterations)
    assert torch.allclose(single.double(), naive_sinkhorn(logits.float(), 0.07, iterations), rtol=1e-5, atol=1e-9)


def test_centred_softmax_is_a_softmax_of_differences() -> None:
    logits, centre = draw(4, 5), draw(5, seed=7)
    ours = losses.centred_softmax(logits, centre, 0.05)
    for row, out in zip(logits, ours, strict=True):
        weights = [math.exp((float(v) - float(c)) / 0.05) for v, c in zip(row, centre, strict=True)]
        for k, weight in enumerate(weights):
            assert float(out[k]) == pytest.approx(weight / sum(weights), abs=1e-9)


def test_share_of_entropy() -> None:
    """It is 1 for the uniform distribution, 0 for certainty, and the mean for a mixture."""
    uniform, certain = torch.full((8,), 1 / 8), torch.eye(8)[0]
    assert float(losses.share_of_entropy(uniform)) == pytest.approx(1.0)
    assert float(losses.share_of_entropy(certain)) == 0.0
    assert float(losses.share_of_entropy(torch.stack((uniform, certain)))) == pytest.approx(0.5)


def test_sinkhorn_does_not_overflow() -> None:
    """Logits of a few units at a small temperature exceed exp in float32 by far."""
    assert losses.sinkhorn_knopp(draw(6, 4, scale=50.0).float(), 0.04).isfinite().all()


# --- values of the published code (dinov3 at 6876159) on M(n, m, a, b)[i, j] = a sin(1 + 3i + 7j + b) --------------


def sines(n: int, m: int, a: float = 1.0, b: float = 0.0) -> Tensor:
    rows, columns = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)
    return (a * (1 + 3 * rows + 7 * columns + b).sin()).float()


def golden_values() -> dict[str, tuple[Tensor, float]]:
    student = torch.stack([sines(4, 5, 1, k) for k in range(3)])
    teacher = torch.stack([losses.sinkhorn_knopp(sines(4, 5, 0.2, k), 0.07) for k in range(2)])
    patches = torch.stack([sines(9, 8, 1, k) for k in range(2)])
    anchor = torch.stack([sines(9, 8, 1, 0.3 + 1.1 * k) for k in range(2)])
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[0, :2] = masks[3, 1:4] = True
    targets = losses.sinkhorn_knopp(sines(5, 5, 0.2, 0.5), 0.07)

    def gram(negatives: str, per_image: bool) -> Tensor:
        return losses.gram_loss(patches, anchor, negatives=negatives, per_image=per_image)

    return {
        "dino-all-pairs": (losses.dino_loss(student, teacher), 3.9728405),
        "dino-off-diagonal": (losses.dino_loss(student[:2], teacher, ignore_diagonal=True), 4.1915269),
        "dino-two-crops": (losses.dino_loss(student[:2], teacher), 3.7851017),
        "koleo": (losses.koleo(sines(6, 8)), 1.3594804),
        "koleo-top2": (losses.koleo(sines(6, 8), neighbours=2), 1.1300305),
        "gram-image": (gram("keep", True), 2.6698242e-4),
        "gram-batch": (gram("keep", False), 6.5731695e-3),
        "gram-image-remove": (gram("remove", True), 1.4051278e-4),
        "gram-batch-remove": (gram("remove", False), 3.1225542e-3),
        "gram-image-remove-teacher": (gram("remove_teacher", True), 0.39494386),
        "gram-batch-remove-teacher": (gram("remove_teacher", False), 0.30149263),
        "ibot": (losses.ibot_loss(sines(5, 5), targets, masks), 1.3234972),
    }


@pytest.mark.parametrize("name", list(golden_values()))
def test_golden_values(name: str) -> None:
    value, expected = golden_values()[name]
    assert float(value) == pytest.approx(expected, abs=5e-6, rel=5e-6)


def test_golden_sinkhorn() -> None:
    ours = losses.sinkhorn_knopp(sines(4, 5, 0.2), 0.07)
    row = torch.tensor([0.36417848, 0.32878014, 0.23622002, 0.06868854, 0.00213284])
    assert torch.allclose(ours[0], row, atol=5e-6)
    assert torch.allclose(ours.sum(0), torch.tensor([0.69373614, 0.65528989, 0.67655021, 0.92463243, 1.04979122]),
                          atol=5e-6)  # fmt: skip


# --- precision, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "ours"), [case[1:3] for case in CASES], ids=[case[0] for case in CASES])
def test_half_inputs_are_computed_in_float32(x: Tensor, ours) -> None:
    """A bfloat16 input gives the float32 value of the same numbers, also inside autocast."""
    rounded = x.bfloat16()
    expected = ours(rounded.float())
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(rounded)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_a_group_that_does_not_divide_the_batch_is_refused() -> None:
    for size in (1, 4):
        with pytest.raises(InputError, match="group"):
            losses.koleo(draw(6, 3), group_size=size)
    with pytest.raises(InputError, match="neighbours"):
        losses.koleo(draw(6, 3), neighbours=6)


def test_sigreg_knows_the_normal_distribution() -> None:
    """Normal samples score lower than collapsed, shifted or stretched ones."""
    x, slices = draw(256, 8), draw(8, 64, seed=5)
    plain = losses.sigreg(x, slices)
    for other in (torch.zeros_like(x), x + 1.0, 2.0 * x):
        assert losses.sigreg(other, slices) > 5 * plain
