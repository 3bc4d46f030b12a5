"""The objectives of DINO, DINOv2 and DINOv3 as pure functions of tensors.

Half-precision inputs are computed in float32 and float64 inputs in float64; autocast is off inside each function.
Targets carry no gradient.  Shapes: B images, S student crops, T teacher crops, P patches, M masked patches, K
prototypes, C channels, n samples.  A loss is a scalar tensor, [].

Source: DINO (arXiv 2104.14294), DINOv2 (2304.07193), DINOv3 (2508.10104); dinov3/loss at 6876159.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = [
    "GramNegatives",
    "GramOf",
    "centred_softmax",
    "dino_loss",
    "feature_loss",
    "gram_loss",
    "ibot_loss",
    "koleo",
    "share_of_entropy",
    "sigreg",
    "sinkhorn_knopp",
]

GramOf = Literal["patches", "channels"]
GramNegatives = Literal["keep", "remove", "remove_teacher"]

P = ParamSpec("P")
R = TypeVar("R")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Turns autocast off, which would compute matrix products in half precision."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return wrapped


# --- targets -----------------------------------------------------------------------------------------------------


def _log_mass(scores: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log of the sum of exp of scores [n, K] over the samples of all processes: [1, K].  Here n may be 0."""
    if group is None:
        return scores.logsumexp(0, keepdim=True)
    peak = scores.amax(0, keepdim=True) if len(scores) else scores.new_full((1, scores.shape[1]), -math.inf)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    mass = (scores - peak).exp().sum(0, keepdim=True)
    dist.all_reduce(mass, dist.ReduceOp.SUM, group=group)
    return peak + mass.log()


@torch.no_grad()
@_without_autocast
def sinkhorn_knopp(
    logits: Tensor,
    temperature: float,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Assigns samples to prototypes so that all prototypes are used about equally.

    Each iteration gives every prototype the same mass over all samples, then every sample mass 1.  The computation is
    in the log domain, where no temperature overflows.

    Args:
        logits: [n, K], the teacher's scores for the samples of this process.
        temperature: softmax temperature of the teacher.
        iterations: pairs of normalisations; 0 is a softmax.
        group: processes that hold further samples; None for a single process.

    Returns:
        [n, K]; each row is a distribution.

    Source: SwAV (arXiv 2006.09882); dinov3/loss/dino_clstoken_loss.py at 6876159, which uses exp and division.
    """
    scores = _wide(logits) / temperature
    for _ in range(iterations):
        scores = scores - _log_mass(scores, group)
        scores = scores.log_softmax(-1)
    return scores.exp() if iterations else scores.softmax(-1)


@torch.no_grad()
@_without_autocast
def centred_softmax(
    logits: Tensor,  # [n, K], the teacher's scores
    centre: Tensor,  # [K], the running mean of its scores
    temperature: float,
) -> Tensor:
    """Softmax of the logits minus their running mean: [n, K].  Source: DINO (arXiv 2104.14294), section 3.1."""
    return ((_wide(logits) - centre) / temperature).softmax(-1)


@torch.no_grad()
@_without_autocast
def share_of_entropy(distributions: Tensor) -> Tensor:
    """Mean entropy of distributions [..., K], divided by the entropy of the uniform distribution: [].

    At 1 all images have the same target.
    """
    entropy: Tensor = torch.special.entr(_wide(distributions)).sum(-1).mean()
    return entropy / math.log(max(distributions.shape[-1], 2))


# --- cross-entropy against them ----------------------------------------------------------------------------------


@_without_autocast
def dino_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 0.1,
    ignore_diagonal: bool = False,
) -> Tensor:
    """Cross-entropy of each student crop against each teacher crop of the same image, averaged over the pairs.

    Args:
        student: [S, B, K], logits.
        teacher: [T, B, K], distributions.
        temperature: softmax temperature of the student.
        ignore_diagonal: leave out the pairs of student crop s and teacher crop t = s, which show the same crop.

    Source: DINO (arXiv 2104.14294), equation 3; dinov3/loss/dino_clstoken_loss.py at 6876159.
    """
    scores = (_wide(student) / temperature).log_softmax(-1)
    crops, others, batch = len(student), len(teacher), student.shape[1]
    if not ignore_diagonal:  # the sum over pairs is a product of sums
        return -(scores.sum(0) * _wide(teacher).sum(0)).sum() / (crops * others * batch)
    pairs = torch.einsum("sbk,tbk->st", scores, _wide(teacher))
    shared = min(crops, others)
    return -(pairs.sum() - pairs.diagonal().sum()) / (batch * (crops * others - shared))


@_without_autocast
def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy on masked patches, averaged over the masked patches of each image, then over all images.

    Images without a mask count as 0: if half of the images are masked, the loss is half that of the masked ones.

    Args:
        student: [M, K], logits of the masked patches, in the order of `masks`.
        teacher: [M, K], distributions of the same patches.
        masks: [B, P] bool, True for a masked patch.
        temperature: softmax temperature of the student.

    Source: iBOT (arXiv 2111.07832), section 3.1; dinov3/loss/ibot_patch_loss.py at 6876159.
    """
    entropy = -(_wide(teacher) * (_wide(student) / temperature).log_softmax(-1)).sum(-1)
    counts = masks.sum(1, keepdim=True).expand_as(masks)[masks]  # [M]: masked patches of the same image
    return (entropy / counts).sum() / len(masks)


# --- spread ------------------------------------------------------------------------------------------------------


def _grouped(x: Tensor, group_size: int | None) -> Tensor:
    """[n, C] -> [n / g, g, C], groups of consecutive samples."""
    size = group_size or len(x)
    if size < 2 or len(x) % size:
        raise InputError(
            f"a batch of {len(x)} samples does not divide into groups of {size}; give a group size of at least 2 that "
            "divides the batch"
        )
    return x.unflatten(0, (-1, size))  # type: ignore[no-any-return]


@_without_autocast
def koleo(
    x: Tensor,
    group_size: int | None = None,
    neighbours: int = 1,
) -> Tensor:
    """Minus the mean log distance of each sample to its nearest neighbours on the unit sphere (Kozachenko-Leonenko).

    Args:
        x: [n, C].
        group_size: consecutive samples among which neighbours are searched; None searches all.
        neighbours: nearest neighbours of each sample that count.

    Raises:
        InputError: the groups do not divide the batch, or are too small for so many neighbours.

    Source: arXiv 1806.03198; dinov3/loss/koleo_loss.py at 6876159, with the same epsilons.
    """
    eps = 1e-8
    unit = F.normalize(_grouped(_wide(x), group_size), dim=-1, eps=eps)
    if not 1 <= neighbours < unit.shape[1]:
        raise InputError(f"a group of {unit.shape[1]} has no {neighbours} neighbours; give 1 to {unit.shape[1] - 1}")
    with torch.no_grad():
        cosines = unit @ unit.mT
        cosines.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        nearest = cosines.topk(neighbours, dim=-1).indices  # [groups, g, k]
    chosen = torch.gather(unit[:, None].expand(-1, unit.shape[1], -1, -1), 2,
                          nearest[..., None].expand(-1, -1, -1, unit.shape[-1]))  # fmt: skip
    distance = (unit[:, :, None] - chosen + eps).norm(dim=-1)
    loss: Tensor = -(distance + eps).log().mean()
    return loss


@_without_autocast
def sigreg(
    x: Tensor,
    slices: Tensor,
    group_size: int | None = None,
    knots: int = 17,
    limit: float = 3.0,
) -> Tensor:
    """Distance of a batch from the standard normal distribution: the mean Epps-Pulley statistic over directions.

    The statistic of one direction is n * integral over t of |mean exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2 / 2).  The
    integrand is even in t, so this is twice its integral over [0, limit] by the trapezoid rule.

    Args:
        x: [n, C].
        slices: [C, directions], vectors of any length above 0.
        group_size: consecutive samples that share a statistic; the result is the mean over groups; None takes all.
        knots: points of the trapezoid rule.
        limit: upper end of the integral.

    Raises:
        InputError: the groups do not divide the batch.

    Source: LeJEPA (arXiv 2511.08544), section 4 (Sketched Isotropic Gaussian Regularisation).
    """
    groups = _grouped(_wide(x), group_size)
    projected = groups @ F.normalize(slices.to(groups.dtype), dim=0)  # [groups, g, directions]
    t = torch.linspace(0.0, limit, knots, dtype=groups.dtype, device=x.device)
    normal = (-0.5 * t**2).exp()
    step = torch.full_like(t, 2.0 * limit / (knots - 1))
    step[[0, -1]] *= 0.5
    statistic = torch.zeros_like(projected[:, 0])
    for k in range(knots):  # one at a time, since all at once would need `knots` times the memory
        angles = projected * t[k]
        error = (angles.cos().mean(1) - normal[k]) ** 2 + angles.sin().mean(1) ** 2
        statistic = statistic + error * (normal[k] * step[k])
    return statistic.mean() * groups.shape[1]


# --- tokens against tokens ---------------------------------------------------------------------------------------


@_without_autocast
def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    of: GramOf = "patches",
    normalise: bool = True,
    per_image: bool = True,
    negatives: GramNegatives = "keep",
) -> Tensor:
    """Mean squared difference between the Gram matrices of student and teacher.

    Args:
        student: [B, P, C].
        teacher: [B, P, C']; with `of="channels"` C' must equal C.
        of: compare similarities between patches (as DINOv3 does) or between channels.
        normalise: compare cosines instead of dot products.
        per_image: compare the patches of one image; False compares the patches of all images with each other.
        negatives: "remove" sets negative similarities to 0, "remove_teacher" only those of the teacher.

    Source: DINOv3 paper (arXiv 2508.10104), section 4; dinov3/loss/gram_loss.py at 6876159.
    """

    def gram(tokens: Tensor) -> Tensor:
        tokens = _wide(tokens)
        if not per_image:
            tokens = tokens.flatten(0, -2)
        rows = tokens if of == "patches" else tokens.mT
        rows = F.normalize(rows, dim=-1) if normalise else rows
        return rows @ rows.mT

    ours = gram(student)
    with torch.no_grad():
        target = gram(teacher)
    if negatives != "keep":
        target = target.clamp(min=0.0)
        ours = ours.clamp(min=0.0) if negatives == "remove" else ours
    return F.mse_loss(ours, target)


@_without_autocast
def feature_loss(
    student: Tensor,  # [..., C]
    teacher: Tensor,  # [..., C]
    cosine: float = 0.9,  # weight of the cosine distance; the rest is smooth L1
) -> Tensor:
    """Distance to the teacher's features, cosine * (1 - cos) + (1 - cosine) * smooth L1, averaged over all vectors.

    Source: AM-RADIO (arXiv 2312.06709), section 3.2, with the same weights.
    """
    ours, target = _wide(student), _wide(teacher.detach())
    direction = 1.0 - F.cosine_similarity(ours, target, dim=-1)
    return cosine * direction.mean() + (1.0 - cosine) * F.smooth_l1_loss(ours, target)
