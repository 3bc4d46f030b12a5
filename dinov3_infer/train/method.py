"""The model of a run and its loss: student, moving average, heads, and the teachers of Gram and distillation.

Shapes: B images, 2B global crops, L local crops per image, P patches, M masked patches, K prototypes, C channels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, ViTBackbone
from ..errors import InputError
from ..model.network import BackboneOutput, as_map
from . import losses
from .adapters import add_adapters
from .config import TrainConfig
from .distributed import group, local, mean_over
from .draws import generator
from .heads import ProjectionHead, Standardise, head_sizes, linear_projection
from .optim import ema_momentum, gram_weight, local_weight, renews_gram, teacher_temperature
from .views import Batch

__all__ = ["Method", "Targets", "split_batch"]

CENTRE_MOMENTUM = 0.9  # DINO v1 and DINOv2
SLICES = 1024  # directions of SIGReg, as FINO
M = TypeVar("M", bound=nn.Module)
Add = Callable[[str, float, Tensor], None]  # adds a term to the loss: name, weight, value []


class Targets(NamedTuple):
    """The targets of a batch of B images (2B global crops); None for a target that no loss needs."""

    dino: Tensor | None = None  # [2, B, K] distributions
    ibot: Tensor | None = None  # [M, K] distributions, of the masked patches
    gram: Tensor | None = None  # [2B, P, C] patch tokens, on the student's grid
    cls: Tensor | None = None  # [2B, C'] class tokens of the distillation teacher
    patches: Tensor | None = None  # [2B, P, C'] its patch tokens


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Splits a batch of B images (shapes: see `Batch`) into `parts` batches of B / parts consecutive images."""

    def cut(crops: Tensor, per_image: int) -> list[Tensor]:
        return [c.flatten(0, 1) for c in crops.unflatten(0, (per_image, -1)).chunk(parts, dim=1)]

    if parts == 1:
        return [batch]
    count = len(batch.indices)
    num_local = len(batch.local_crops) // count
    gram = [None] * parts if batch.gram_crops is None else cut(batch.gram_crops, 2)
    local = cut(batch.local_crops, num_local) if num_local else [batch.local_crops] * parts
    pieces = zip(cut(batch.global_crops, 2), local, gram, cut(batch.masks, 2), batch.indices.chunk(parts), strict=True)
    return [Batch(*piece) for piece in pieces]


class Method(nn.Module):
    """The model of a run.

    A step calls `targets` on all parts of its batch, then `forward` and a backward pass for each part, then the
    optimiser, then `update_ema`.

    Attributes:
        student: backbone, and as far as the losses need them dino_head, ibot_head, cls_projection, patch_projection.
        ema: the moving average of the student, with the same parts.
        teacher: the distillation teacher, or None.
        gram_teacher: the teacher of Gram anchoring, or None.
        scales: layers that bring the tokens before a head, and those of the distillation teacher, to mean 0 and
            variance 1.
    """

    student: nn.ModuleDict
    ema: nn.ModuleDict
    teacher: Backbone | None
    gram_teacher: Backbone | None
    scales: nn.ModuleDict

    def __init__(self, config: TrainConfig, backbone: ViTBackbone, teacher: Backbone | None = None) -> None:
        super().__init__()
        self.config = config
        width = backbone.embed_dim
        if config.local_cls_norm and backbone.local_cls_norm is None:
            add_local_norm(backbone)
        parts: dict[str, nn.Module] = {"backbone": backbone.train()}
        sizes = head_sizes(config)
        for name, size in sizes.items():
            if (part := self.head_of(name)) not in parts:
                parts[part] = ProjectionHead(width, *size, config.unit_prototypes)
        if teacher is not None and config.feature_weight:
            parts["cls_projection"] = linear_projection(width, teacher.embed_dim)
            parts["patch_projection"] = linear_projection(width, teacher.embed_dim)
        self.student = nn.ModuleDict(parts)
        self.choose_trained(backbone)
        self.ema = frozen(copy.deepcopy(self.student))
        self.teacher = None if teacher is None else frozen(teacher)
        self.gram_teacher = frozen(copy.deepcopy(backbone)) if config.gram in ("start", "renew") else None
        if config.centring == "centre":
            for name, (*_, prototypes) in sizes.items():
                self.register_buffer(f"{name}_centre", torch.zeros(prototypes, dtype=torch.float32))
        scales = {name: Standardise(width, window=100) for name in sizes if config.standardise}
        if teacher is not None:
            scales |= {name: Standardise(teacher.embed_dim) for name in ("teacher_cls", "teacher_patches")}
        self.scales = nn.ModuleDict(scales)

    @property
    def backbone(self) -> ViTBackbone:
        """The backbone of the student."""
        return cast(ViTBackbone, self.student["backbone"])

    @property
    def average(self) -> Backbone:
        """The moving average of the student's backbone, which is the result of a run."""
        return cast(Backbone, self.ema["backbone"])

    def choose_trained(self, backbone: Backbone) -> None:
        """Freezes what is not trained, and adds adapters for tune="lora".  Raises: InputError without a mask token."""
        config = self.config
        if config.tune == "lora":
            add_adapters(backbone, config.lora_rank)
        if config.tune == "last":
            backbone.requires_grad_(False)
            norms = (backbone.norm, backbone.cls_norm, backbone.local_cls_norm)
            for module in (*backbone.blocks[-config.tune_blocks :], *norms):
                if module is not None:
                    module.requires_grad_(True)
        if backbone.mask_token is None and config.masks:
            raise InputError("this model has no mask token, which iBOT needs; set ibot_weight=0")
        if backbone.mask_token is not None and not config.masks:
            backbone.mask_token.requires_grad_(False)
        if backbone.local_cls_norm is not None and not config.looks_at_local_crops:
            backbone.local_cls_norm.requires_grad_(False)

    def train(self, mode: bool = True) -> "Method":
        """Sets the student to training mode; moving average and teachers stay in eval mode."""
        super().train(mode)
        for module in (self.ema, self.teacher, self.gram_teacher):
            if module is not None:
                module.eval()
        return self

    # --- the teachers --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def targets(self, batches: Sequence[Batch], step: int) -> list[Targets]:
        """The targets of all parts of a batch; computed together, because Sinkhorn-Knopp needs the whole batch.

        Args:
            batches: the parts of this process' share of the batch (shapes: see `Batch`).
            step: number of the step, from 0.
        """
        config = self.config
        dino, ibot, gram, cls, patches = [], [], [], [], []
        for batch in batches:
            if config.dino_weight or config.ibot_weight or config.gram == "ema":
                out: BackboneOutput = self.average(batch.global_crops)
                if config.dino_weight:
                    dino.append(out.cls_token)
                if config.ibot_weight:
                    ibot.append(out.patch_tokens[batch.masks])
                if config.gram == "ema":
                    gram.append(out.patch_tokens)
            crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
            if self.gram_teacher is not None and gram_weight(config, step):
                grid = self.backbone.grid_of(batch.global_crops)
                gram.append(resize_tokens(self.gram_teacher(crops), self.gram_teacher.grid_of(crops), grid))
            if self.teacher is not None:
                out = self.teacher(crops)
                cls.append(out.cls_token)
                patches.append(out.patch_tokens)
        if cls:
            self.learn("teacher_cls", cls, step)
            self.learn("teacher_patches", patches, step)
        nothing: list[None] = [None] * len(batches)
        columns = (
            [s.unflatten(0, (2, -1)) for s in self.assign(dino, "dino_head", step)] if dino else nothing,
            self.assign(ibot, "ibot_head", step) if ibot else nothing,
            gram or nothing,
            cls or nothing,
            patches or nothing,
        )
        return [Targets(*row) for row in zip(*columns, strict=True)]

    def assign(self, tokens: list[Tensor], head: str, step: int) -> list[Tensor]:
        """Tokens of all parts, each [n, C], to distributions of all parts, each [n, K]."""
        config = self.config
        self.learn(head, tokens, step)
        scores = [self.scores(self.ema, head, part) for part in tokens]
        joined = torch.cat(scores)
        temperature = teacher_temperature(config, step)
        if config.centring == "sinkhorn":
            found = losses.sinkhorn_knopp(joined, temperature, group=group())
        else:
            centre = self.get_buffer(f"{head}_centre")
            found = losses.centred_softmax(joined, centre, temperature)
            centre.lerp_(mean_over(joined.to(centre.dtype)), 1.0 - CENTRE_MOMENTUM)
        return list(found.split([len(part) for part in scores]))

    def learn(self, scale: str, parts: list[Tensor], step: int) -> None:
        """Updates the mean and variance of a scale, if there is one, from tokens [..., C]."""
        if scale in self.scales:
            cast(Standardise, self.scales[scale]).learn(torch.cat(parts), step)

    def head_of(self, objective: str) -> str:
        """The part that scores the tokens of "dino_head" or "ibot_head"; both may share the DINO head."""
        return "dino_head" if self.config.shares_head else objective

    def scores(self, model: nn.ModuleDict, head: str, tokens: Tensor) -> Tensor:
        """Scores [..., K] of tokens [..., C] by a head of the student or the moving average."""
        if head in self.scales:
            tokens = self.scales[head](tokens)
        return model[self.head_of(head)](tokens)  # type: ignore[no-any-return]

    # --- the student ---------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, targets: Targets, step: int) -> dict[str, Tensor]:
        """The loss of one part of a batch.

        Args:
            batch: the images (shapes: see `Batch`).
            targets: of this part, from `targets`.
            step: number of the step, from 0.

        Returns:
            Scalars [] by name: each term, the weighted sum "loss", and values for the record.  The mean over the parts
            of a batch equals the value for the whole batch.

        Raises:
            InputError: student and distillation teacher have a different number of patches.
        """
        config = self.config
        crops, masks = [batch.global_crops], [batch.masks if config.masks else None]
        if len(batch.local_crops):
            crops, masks = [*crops, batch.local_crops], [*masks, None]
        learns = torch.is_grad_enabled() and step >= config.share(config.freeze_share)
        with torch.set_grad_enabled(learns):
            left_out, drawn = config.drop_paths(len(self.backbone.blocks)), generator(config.seed, step, "student")
            outputs = self.backbone.forward_packed(crops, masks, config.rope, left_out, drawn)
        terms: dict[str, Tensor] = {}
        total: list[Tensor] = []

        def add(name: str, weight: float, value: Tensor) -> None:
            terms[name] = value.detach()
            total.append(weight * value)

        seen = outputs[0]
        if targets.dino is not None:
            self.add_dino(outputs, targets.dino, step, add)
            terms["teacher_entropy"] = losses.share_of_entropy(targets.dino)
        if targets.ibot is not None:
            scores = self.scores(self.student, "ibot_head", seen.patch_tokens[batch.masks])
            ibot = losses.ibot_loss(scores, targets.ibot, batch.masks, config.student_temperature)
            add("ibot", config.ibot_weight, ibot)
        # the groups divide the images, so no group holds two crops of one image, which would be nearest neighbours
        size = min(config.spread_group, len(batch.indices))
        if config.koleo_weight:
            add("koleo", 2 * config.koleo_weight, losses.koleo(seen.cls_token, size))  # summed over the two crops
        if config.sigreg_weight:
            drawn = generator(config.seed, step, "slices")
            width = seen.cls_token.shape[1]
            slices = torch.randn(width, SLICES, generator=drawn, dtype=torch.float32, device="cpu")
            add("sigreg", config.sigreg_weight, losses.sigreg(seen.cls_token, slices.to(seen.cls_token.device), size))
        if targets.gram is not None:
            add("gram", gram_weight(config, step), losses.gram_loss(seen.patch_tokens, targets.gram, of=config.gram_of))
        if targets.cls is not None and targets.patches is not None:
            self.add_distillation(seen, targets.cls, targets.patches, add)
        terms["loss"] = torch.stack(total).sum()
        return terms

    def add_dino(self, outputs: Sequence[BackboneOutput], targets: Tensor, step: int, add: Add) -> None:
        """Adds the DINO loss: each global crop against the other one, local crops against both, with equal weight.

        `outputs`: of the 2B global and the L*B local crops, if there are any.  `targets`: [2, B, K] distributions.
        """
        config, batch = self.config, targets.shape[1]
        tokens = torch.cat([out.cls_token for out in outputs])
        scores = self.scores(self.student, "dino_head", tokens).unflatten(0, (-1, batch))
        num_local = len(scores) - 2
        of_all = 2 + 2 * num_local
        add("dino_global", config.dino_weight * 2 / of_all,
            losses.dino_loss(scores[:2], targets, config.student_temperature, ignore_diagonal=True))  # fmt: skip
        if num_local:
            add("dino_local", config.dino_weight * local_weight(config, step) * 2 * num_local / of_all,
                losses.dino_loss(scores[2:], targets, config.student_temperature))  # fmt: skip

    def add_distillation(self, seen: BackboneOutput, cls: Tensor, patches: Tensor, add: Add) -> None:
        """Adds the distillation losses: projected student tokens against standardised teacher tokens, and similarities.

        `seen`: the student's output for the 2B global crops.  `cls` [2B, C'] and `patches` [2B, P, C']: teacher tokens.
        Raises: InputError if student and teacher have a different number of patches.
        """
        config, student = self.config, self.student
        if patches.shape[1] != seen.patch_tokens.shape[1]:
            raise InputError(
                f"the teacher has {patches.shape[1]} patches and the student {seen.patch_tokens.shape[1]}; set gram_px "
                "so that both have the same grid"
            )
        if config.feature_weight:
            ours = student["cls_projection"](seen.cls_token), student["patch_projection"](seen.patch_tokens)
            targets = self.scales["teacher_cls"](cls), self.scales["teacher_patches"](patches)
            for name, found, wanted in zip(("feature_cls", "feature_patch"), ours, targets, strict=True):
                add(name, config.feature_weight, losses.feature_loss(found, wanted))
        if config.relation_weight:
            add("relation_patch", config.relation_weight, losses.gram_loss(seen.patch_tokens, patches))
            size = min(config.spread_group, len(cls) // 2)
            groups = (seen.cls_token.unflatten(0, (-1, size)), cls.unflatten(0, (-1, size)))
            add("relation_cls", config.relation_weight, losses.gram_loss(*groups))

    # --- after a step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Updates the moving average after an optimiser step, and the Gram teacher at the steps of a renewal."""
        ours: list[Tensor] = [local(p) for p in self.student.parameters() if p.requires_grad]
        pairs = zip(self.ema.parameters(), self.student.parameters(), strict=True)
        averages: list[Tensor] = [local(average) for average, p in pairs if p.requires_grad]
        torch._foreach_lerp_(averages, ours, 1.0 - ema_momentum(self.config, step))
        if self.config.gram == "renew" and renews_gram(self.config, step):
            assert self.gram_teacher is not None
            for copied, average in zip(self.gram_teacher.parameters(), self.average.parameters(), strict=True):
                local(copied).copy_(local(average))


def add_local_norm(backbone: ViTBackbone) -> None:
    """Adds a separate final norm for the class tokens of local crops, as a copy of the present one."""
    backbone.local_cls_norm = copy.deepcopy(backbone.cls_norm or backbone.norm)
    backbone.config = replace(backbone.config, local_cls_norm=True)


def frozen(module: M) -> M:
    """Sets a module to eval mode, without gradients, and returns it."""
    return module.eval().requires_grad_(False)


def resize_tokens(output: BackboneOutput, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Resizes patch tokens [B, P, C] from one grid (rows, columns) to another, bicubic without antialias.

    Source: DINOv3 paper (arXiv 2508.10104), section 4.2.
    """
    if grid == wanted:
        return output.patch_tokens
    tokens = as_map(output.patch_tokens, grid)
    return F.interpolate(tokens, size=wanted, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
