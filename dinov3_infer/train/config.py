"""All settings of a training run in one table, and presets as tables of the settings that they change.

Each field carries its explanation (`option`); its type says which values it takes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError, check_choice
from ..model.rope import RopeAugmentation
from .blocks import Recompute
from .losses import GramOf
from .options import Count, CountFrom0, Pair, Positive, Share, Shares, Weight, check_fields, option
from .views import ViewConfig

__all__ = ["PRESETS", "TrainConfig"]

Preset = Literal["adapt", "dinov3", "distill"]


# fmt: off
# One setting in a line or two reads better here than one argument in a line.
@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.  Sizes are in pixels, `_steps` in optimiser steps, `_share` in shares of the run.

    The defaults are those of preset "adapt", which continues the training of a released backbone on your own images.
    "DINOv3" in a text refers to dinov3/configs at 6876159, "FINO" to the fine-tuning branch of that repository.  A
    value without a source is ours.

    Raises:
        InputError: a value has a wrong type or lies outside its range, or two settings contradict each other.
    """

    data: tuple[str, ...] = option(
        (), "folders, list files (.txt) or tar shards; 'A:0.1:pure' takes a tenth of the batches from A alone",
        heading="model and data")
    model: str = option("vits16", "backbone to start from: name, path or hub id; with from_scratch only a name")
    out: str = option("", "folder of the run: checkpoints, metrics and the trained backbone")
    from_scratch: bool = option(False, "start from random weights")
    teacher: str = option("", "backbone to distil from: name, path or hub id")

    steps: Count = option(2000, "optimiser steps", heading="length and batches")
    batch_size: Count = option(64, "images per step, over all processes and accumulation steps")
    accumulate: Count = option(1, "parts in which each process computes its batch; saves memory, same result")
    seed: int = option(0, "seed of every random draw")

    levels: str = option(
        "", "for images of more than 8 bits: the values that become black and white, as 'LOW,HIGH'; or 'full' (the "
        "range of the data type) or 'percentile' (of each image)")
    global_px: Count = option(224, "side of the two global crops, in pixels", heading="views (see views.ViewConfig)")
    local_px: CountFrom0 = option(96, "side of a local crop, in pixels")
    num_local: CountFrom0 = option(8, "local crops per image, as DINOv3")
    gram_px: CountFrom0 = option(
        0, "side of the crops for the Gram or distillation teacher, pixels; 0 gives it as many patches as the student")
    sizes: tuple[str, ...] = option(
        (), "mixed resolutions, each as global/local/Gram pixels and a probability: '512/112/768:0.3'")
    global_scale: Shares = option((0.32, 1.0), "share of the image's area in a global crop, as DINOv3")
    local_scale: Shares = option((0.05, 0.32), "share of the image's area in a local crop, as DINOv3")
    flip: Share = option(0.5, "probability that a crop is mirrored")
    distortions: bool = option(True, "apply colour jitter, greyscale, blur and solarisation")
    blur: bool = option(True, "apply blur; its strength is in pixels, too strong for images of 32 pixels")
    mask_share: Share = option(0.5, "share of the global crops in which patches are masked, as DINOv3")
    mask_ratio: Shares = option((0.1, 0.5), "share of the patches that a masked crop hides, as DINOv3")

    dino_weight: Weight = option(
        1.0, "weight of the DINO loss, which makes class tokens of different crops of an image agree, as DINOv3",
        heading="objectives")
    local_weight: Weight = option(
        1.0, "factor of the local crops' part of the DINO loss, as DINOv3; 0.5 in its high-resolution stage")
    ibot_weight: Weight = option(1.0, "weight of the iBOT loss, which predicts masked patches, as DINOv3")
    koleo_weight: Weight = option(0.1, "weight of the KoLeo loss, which spreads the class tokens, as DINOv3")
    sigreg_weight: Weight = option(0.0, "weight of SIGReg, which can replace KoLeo; FINO uses 0.05")
    spread_group: Count = option(16, "images within which KoLeo and SIGReg compare; DINOv3 paper, section 3.2")
    gram: Literal["off", "start", "ema", "renew"] = option(
        "off", "teacher of Gram anchoring: the start weights, the moving average (ema), or a copy of it that is "
        "renewed at intervals")
    gram_weight: Weight = option(2.0, "weight of the Gram loss, as DINOv3")
    gram_begin_share: Share = option(0.0, "share of the run before Gram anchoring begins")
    gram_ramp_share: Share = option(
        0.0, "share of the run in which the Gram weight rises from 0, along half a cosine; DINOv3 uses 0.005")
    gram_local_weight: Weight = option(
        1.0, "factor on local_weight when the Gram weight has its full value; DINOv3 uses 0.5")
    gram_renew_steps: Count = option(10_000, "steps between renewals with gram='renew', as DINOv3")
    gram_renewals: CountFrom0 = option(0, "number of renewals with gram='renew'; 0 sets no limit; DINOv3 uses 3")
    gram_of: GramOf = option(
        "patches", "similarities that the Gram loss compares: between patches or between channels, as DINOv3")
    feature_weight: Weight = option(0.0, "distillation: weight of the loss on the teacher's features")
    relation_weight: Weight = option(
        0.0, "distillation: weight of the loss on the teacher's similarities between images and between patches")

    dino_prototypes: Count = option(16_384, "prototypes of the DINO head", heading="heads and targets")
    ibot_prototypes: CountFrom0 = option(
        16_384, "prototypes of the iBOT head; with 0 the DINO head scores patches too, as DINOv2")
    head_hidden: Count = option(2048, "hidden width of a head, as DINOv3; its 7B uses 8192")
    head_bottleneck: Count = option(256, "bottleneck width of a head, as DINOv3; its 7B uses 512")
    ibot_hidden: CountFrom0 = option(0, "hidden width of the iBOT head; 0 takes head_hidden; DINOv3's 7B uses 4096")
    ibot_bottleneck: CountFrom0 = option(
        0, "bottleneck width of the iBOT head; 0 takes head_bottleneck; DINOv3's 7B uses 384")
    unit_prototypes: bool = option(
        True, "keep prototypes at length 1, as DINO v1; free ones (DINOv3) need thousands of steps to become useful")
    standardise: bool = option(True, "give the heads tokens of mean 0 and variance 1")
    centring: Literal["sinkhorn", "centre"] = option(
        "sinkhorn", "balancing of the teacher's targets: Sinkhorn-Knopp or a running centre, as DINOv3")
    student_temperature: Positive = option(0.1, "softmax temperature of the student, as DINOv3")
    teacher_temperature_start: Positive = option(0.04, "softmax temperature of the teacher at step 0, as DINOv3")
    teacher_temperature: Positive = option(
        0.04, "softmax temperature of the teacher after its warm-up; DINOv3 uses 0.07")
    teacher_temperature_share: Share = option(
        0.1, "share of the run in which the teacher's temperature changes, as DINOv3")

    tune: Literal["full", "last", "lora"] = option(
        "full", "trained part of the backbone: all, the last blocks, or low-rank adapters", heading="what is trained")
    tune_blocks: Count = option(4, "with tune='last': blocks that are trained, besides the final norm")
    lora_rank: Count = option(16, "with tune='lora': rank of the adapters")
    freeze_share: Share = option(
        0.05, "share of the run in which only the heads are trained, since they start untrained; FINO uses 0.4")
    ramp_share: Share = option(
        0.05, "share of the run after that in which the backbone's learning rate rises; FINO uses 0.04")
    freeze_prototypes_share: Share = option(
        0.0, "share of the run in which the prototypes do not change; DINOv3 uses 0.005 to 0.01, from scratch")
    drop_path: Share = option(
        0.0, "stochastic depth: share of the images that skip a block; DINOv3 uses 0.3 to 0.4, from scratch")
    drop_path_grows: bool = option(False, "let drop_path grow linearly from 0 in the first block, as DINO v1")
    local_cls_norm: bool = option(False, "add a separate final norm for local crops; DINOv3's 7B has one")
    rope_rescale: float = option(
        2.0, "largest random rescaling of the RoPE coordinates: 2 draws from 1/2 to 2, 1 turns it off; as DINOv3")

    lr_at_1024: Positive = option(
        4e-4, "learning rate for a batch of 1024, multiplied by sqrt(batch_size / 1024); DINOv3 states a quarter of it",
        heading="optimiser (AdamW)")
    lr_end_share: Weight = option(
        1.0, "last learning rate as a share of the highest; 1 keeps it constant after the warm-up, as DINOv3")
    head_lr: Positive = option(5.0, "learning rate of the heads, as a multiple of the backbone's")
    warmup_share: Share = option(0.1, "share of the run in which the learning rate rises, as DINOv3")
    warmup: Literal["line", "cosine"] = option(
        "line", "shape of the warm-up, as DINOv3; half a cosine in its high-resolution stage")
    weight_decay: Weight = option(0.04, "weight decay at step 0, as DINOv3")
    weight_decay_end: Weight = option(0.04, "weight decay at the last step, as DINOv3")
    betas: Pair = option((0.9, 0.99), "betas of AdamW, as DINOv3")
    clip: Positive = option(3.0, "largest gradient norm of the backbone and of each head, as DINOv3")
    layer_decay: Positive = option(0.98, "learning rate of a block as a multiple of the next block's, as DINOv3")
    patch_lr: Positive = option(0.2, "factor on the learning rate of the patch embedding, as DINOv3")
    ema_momentum: Share = option(
        0.98, "momentum of the moving average (EMA) at step 0; short runs need less, about 0.95 for 300 steps; DINOv3 "
        "uses 0.994")
    ema_momentum_end: Share = option(0.998, "momentum of the moving average at the last step; about 0.99 for 300 steps")

    device: str = option("auto", "device: cpu, cuda or cuda:1; auto takes cuda if there is one", heading="machine")
    precision: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto", "dtype of the arithmetic; weights stay float32, or float64; auto takes bfloat16 on a GPU that has it")
    workers: CountFrom0 = option(2, "processes that prepare images")
    recompute: Recompute = option(
        "cheap", "activations of a block that the backward pass computes again: saves memory, costs time")
    compile: bool = option(False, "compile the blocks with torch.compile")
    engine: Literal["ddp", "fsdp"] = option("ddp", "under torchrun: replicate the model (ddp) or shard it (fsdp)")

    log_steps: Count = option(10, "steps between lines of metrics.jsonl", heading="records")
    checkpoint_steps: Count = option(500, "steps between checkpoints")
    keep_checkpoints: Count = option(2, "newest checkpoints to keep")
    health_steps: Count = option(200, "steps between health checks (spread, RankMe, 20-NN, drift)")
    health_data: str = option("", "held-out images for health checks, a folder per class (default: training images)")
    health_pictures: Count = option(512, "images in a health check")
    stop_on_collapse: bool = option(True, "stop the run when the features collapse")

    def __post_init__(self) -> None:
        check(self)

    # --- values that follow from the settings --------------------------------------------------------------------
    # fmt: on

    def share(self, part: float) -> int:
        """A share of the run in steps, rounded."""
        return round(part * self.steps)

    @property
    def lr(self) -> float:
        """Highest learning rate, for the batch size of the run."""
        return self.lr_at_1024 * (self.batch_size / 1024) ** 0.5  # type: ignore[no-any-return]

    @property
    def distils(self) -> bool:
        """Whether the run distils a teacher."""
        return bool(self.teacher)

    @property
    def masks(self) -> bool:
        """Whether patches are masked."""
        return self.ibot_weight > 0

    @property
    def looks_at_local_crops(self) -> bool:
        """Whether a loss uses the local crops."""
        return self.num_local > 0 and self.dino_weight > 0

    @property
    def shares_head(self) -> bool:
        """Whether the masked patches go through the DINO head."""
        return self.masks and not self.ibot_prototypes

    def drop_paths(self, depth: int) -> float | list[float]:
        """The drop path share: one number for all blocks, or a list with one for each of `depth` blocks."""
        if not self.drop_path_grows:
            return self.drop_path
        return [self.drop_path * block / max(1, depth - 1) for block in range(depth)]

    @property
    def rope(self) -> RopeAugmentation | None:
        """The random rescaling of RoPE coordinates; None if it is off.  Raises: InputError for a factor below 1."""
        return None if self.rope_rescale == 1 else RopeAugmentation(rescale=self.rope_rescale)

    def view_configs(self, patch_size: int, teacher_patch: int, mean: Any, std: Any) -> list[tuple[float, ViewConfig]]:
        """A pair (probability, views) for each resolution.

        Args:
            patch_size: of the student, in pixels; sides are rounded to whole patches of it.
            teacher_patch: patch size of the Gram or distillation teacher, in pixels.
            mean: of the RGB channels, for normalisation.
            std: of the RGB channels.

        Raises:
            InputError: `sizes` cannot be read, or a value does not fit `ViewConfig`.
        """
        wanted = [_sizes(text) for text in self.sizes] or [(self.global_px, self.local_px, self.gram_px, 1.0)]
        others = self.distils or self.gram in ("start", "renew")  # this teacher has separate crops
        changes: dict[str, Any] = {}
        if not (self.blur and self.distortions):
            changes |= dict(global_blur=(0.0, 0.0), local_blur=0.0)
        if not self.distortions:
            changes |= dict(solarize=0.0, jitter_probability=0.0, grey=0.0)
        found = []
        for global_px, local_px, gram_px, probability in wanted:
            patches = max(1, round(global_px / patch_size))
            global_px, gram_px = patches * patch_size, gram_px or patches * teacher_patch
            views = ViewConfig(
                global_px=global_px,
                local_px=max(1, round(local_px / patch_size)) * patch_size,
                gram_px=gram_px if others and gram_px != global_px else None,
                num_local=self.num_local,
                global_scale=self.global_scale,
                local_scale=self.local_scale,
                flip=self.flip,
                mean=mean,
                std=std,
                patch_size=patch_size,
                mask_probability=self.mask_share if self.masks else 0.0,
                mask_ratio=self.mask_ratio,
                **changes,
            )
            found.append((probability, views))
        return found

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TrainConfig":
        """The settings of a preset, with some of them replaced.

        Example:
            >>> TrainConfig.preset("adapt", data=("photos/",), model="vits16", out="run", steps=300)

        Raises:
            InputError: there is no such preset or setting, or a value is wrong.
        """
        check_choice("preset", name, PRESETS)
        known = {field.name for field in dataclasses.fields(cls)}
        for field in overrides:
            if field not in known:
                raise InputError(f"{field!r} is not a setting of the trainer; 'dinov3-infer train --help' lists them")
        return cls(**(PRESETS[name] | overrides))


PRESETS: dict[str, dict[str, Any]] = {
    "adapt": {},
    # dinov3/configs/ssl_default_config.yaml: the ViT-L recipe on ImageNet, for the architecture of the released models
    # differs: model.num_registers: source 0; ours 4; the released models have them
    # differs: model.key_bias: source true; ours false; the released models have none
    # differs: model.norm_eps: source 1e-06; ours 1e-05; the released models have it
    # differs: rope_rescale: source 1; ours 2; the released models were trained with it
    # differs: precision: source parameters, tokens and RoPE in bfloat16; ours products only; weights stay float32
    # differs: schedules: source warm-up whole a step earlier, cosine not quite ended; ours ends; 1e-4 of the peak apart
    "dinov3": dict(
        from_scratch=True, model="vitl16", steps=125_000, batch_size=2048, dino_prototypes=65_536,
        ibot_prototypes=65_536, spread_group=64, freeze_share=0.0, ramp_share=0.0, freeze_prototypes_share=0.01,
        drop_path=0.3, lr_at_1024=4e-3, lr_end_share=1.767767e-4, weight_decay_end=0.4, betas=(0.9, 0.999),
        layer_decay=0.9, ema_momentum=0.992, ema_momentum_end=1.0, teacher_temperature=0.07,
        teacher_temperature_share=0.3, head_lr=1.0, unit_prototypes=False, standardise=False,
    ),
    # Distillation of features, as in AM-RADIO (arXiv 2312.06709).  DINOv3 (paper, section 5.2) compares the heads of
    # student and teacher, but the released teachers have no heads.
    "distill": dict(
        from_scratch=True, model="nano", steps=20_000, batch_size=64, global_px=128, num_local=0, distortions=False,
        dino_weight=0.0, ibot_weight=0.0, koleo_weight=0.0, feature_weight=1.0, relation_weight=1.0,
        freeze_share=0.0, ramp_share=0.0, rope_rescale=1.0, lr_at_1024=4e-3, lr_end_share=0.0, warmup_share=0.05,
        betas=(0.9, 0.999), layer_decay=1.0, patch_lr=1.0, ema_momentum=0.99, ema_momentum_end=0.9999, head_lr=1.0,
    ),
}  # fmt: skip


def _sizes(text: str) -> tuple[int, int, int, float]:
    """ "512/112/768:0.3" -> 512, 112, 768, 0.3."""
    try:
        pixels, _, probability = text.partition(":")
        global_px, local_px, gram_px = (int(part) for part in pixels.split("/"))
        return global_px, local_px, gram_px, float(probability or 1)
    except ValueError:
        raise InputError(f"sizes are 'global/local/gram:probability', as in '512/112/768:0.3'; got {text!r}") from None


def check(config: TrainConfig) -> None:
    """Checks each setting, and that the settings fit together.

    Raises:
        InputError: the first fault.
    """
    check_fields(config)
    _ = config.rope, [_sizes(text) for text in config.sizes]  # raise for wrong values
    if config.batch_size < 2:
        raise InputError(f"batch_size is {config.batch_size}; the losses compare images, so give at least 2")
    if config.batch_size % config.accumulate:
        raise InputError(f"batch_size {config.batch_size} does not split into {config.accumulate} equal parts")
    if config.distils and not (config.feature_weight or config.relation_weight):
        raise InputError("teacher is set, but feature_weight and relation_weight are 0; set one of them")
    if not config.distils and (config.feature_weight or config.relation_weight):
        raise InputError("feature_weight and relation_weight need a teacher; set teacher= to a name, path or hub id")
    if config.gram == "start" and config.from_scratch:
        raise InputError("gram='start' imitates the start weights, which are random here; use gram='renew' or 'ema'")
    if config.tune == "lora" and config.engine == "fsdp":
        raise InputError("engine='fsdp' cannot shard the adapters of tune='lora'; use engine='ddp'")
    if config.local_cls_norm and not config.looks_at_local_crops:
        raise InputError("local_cls_norm needs local crops and the DINO loss; set num_local and dino_weight above 0")
    if config.shares_head and (config.ibot_hidden or config.ibot_bottleneck):
        raise InputError(
            "ibot_prototypes=0 shares the DINO head, so ibot_hidden and ibot_bottleneck do not apply; remove them"
        )
    if config.gram_renewals and config.gram != "renew":
        raise InputError(f"gram_renewals needs gram='renew', and gram is {config.gram!r}; remove gram_renewals")
    if config.ibot_weight and not config.mask_share:
        raise InputError("ibot_weight is above 0 but mask_share is 0, so nothing is masked; set ibot_weight=0")
    if not any((config.dino_weight, config.ibot_weight, config.feature_weight, config.relation_weight)):
        raise InputError("no objective has a weight; set dino_weight, ibot_weight or feature_weight above 0")
