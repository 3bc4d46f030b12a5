"""One flat table of everything that a run can be told, and presets as tables of what they change.

A field says what it means (`option`), and its type says which values it takes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_origin

from ..errors import InputError, check_choice
from ..model.rope import RopeAugmentation
from .blocks import Recompute
from .losses import GramOf
from .views import ViewConfig

__all__ = ["PRESETS", "TrainConfig"]

Preset = Literal["adapt", "dinov3", "distill"]
Pair = tuple[float, float]
T = TypeVar("T")


def above_0(value: float) -> str | None:
    """What is wrong with a value; the same for the three below."""
    return None if value > 0 else f"is {value}; give a value above 0"


def not_below_0(value: float) -> str | None:
    return None if value >= 0 else f"is {value}; give 0 or more"


def share(value: float) -> str | None:
    return None if 0 <= value <= 1 else f"is {value}; give a value from 0 to 1"


def shares(value: Pair) -> str | None:
    low, high = value
    return None if 0 < low <= high <= 1 else f"is a range of shares, got {low} to {high}; give 0 < low <= high <= 1"


Count = Annotated[int, above_0]
CountFrom0 = Annotated[int, not_below_0]
Positive = Annotated[float, above_0]
Weight = Annotated[float, not_below_0]
Share = Annotated[float, share]
Shares = Annotated[Pair, shares]


def option(default: T, text: str = "", heading: str = "") -> T:
    """A field with its text in `--help`, and the heading that stands above it and those that follow."""
    return dataclasses.field(default=default, metadata={"text": text, "heading": heading})


@dataclass(frozen=True)
class TrainConfig:
    """A run.  Sizes are in pixels, `_steps` in optimiser steps, `_share` in parts of the run.

    The defaults are those of preset "adapt": going on with a released backbone on pictures of one's own.  Values
    without a source are ours.  "v3" is dinov3/configs at 6876159, "FINO" the fine-tuning branch of that repository.
    """

    data: tuple[str, ...] = option(
        (), 'folders, list files, tar shards; "A:0.1:pure" gives A a tenth of the batches, unmixed', heading="what"
    )
    model: str = option("vits16", "name, path or hub id; with `from_scratch` a name")
    out: str = option("", "folder of the run")
    from_scratch: bool = option(False, "random weights")
    teacher: str = option("", "of a distillation: name, path or hub id")

    steps: Count = option(2000, "of the optimiser", heading="how long, how many")
    batch_size: Count = option(64, "pictures per step, of all processes and accumulation steps together")
    accumulate: Count = option(1, "parts that the batch of a process is computed in: memory against time, same result")
    seed: int = option(0, "of every random draw")

    levels: str = option(
        "", 'of images of more than 8 bits what is black and white: "LOW,HIGH", "full" or "percentile"'
    )
    global_px: Count = option(224, "side of the two global crops", heading="views (see views.ViewConfig)")
    local_px: CountFrom0 = option(96, "side of a local crop")
    num_local: CountFrom0 = option(8, "local crops of each picture; v3")
    gram_px: CountFrom0 = option(
        0, "of the Gram or distillation teacher; 0: what gives it the student's grid of patches"
    )
    sizes: tuple[str, ...] = option((), 'mixed resolutions, "512/112/768:0.3": global, local, Gram crops, probability')
    global_scale: Shares = option((0.32, 1.0), "share of the picture's area; v3")
    local_scale: Shares = option((0.05, 0.32), "likewise; v3")
    flip: Share = option(0.5, "probability")
    distortions: bool = option(True, "of colours, blur, solarisation")
    blur: bool = option(True, "its strength is in pixels, too much for pictures of 32")
    mask_share: Share = option(0.5, "of the global crops, that patches are hidden in; v3")
    mask_ratio: Shares = option((0.1, 0.5), "share of the patches of a masked crop; v3")

    dino_weight: Weight = option(1.0, "class tokens of different crops say the same; v3", heading="objectives")
    local_weight: Weight = option(1.0, "of the local crops' part; v3, 0.5 in the high-resolution stage")
    ibot_weight: Weight = option(1.0, "hidden patches are told from the others; v3")
    koleo_weight: Weight = option(0.1, "pictures keep apart; v3")
    sigreg_weight: Weight = option(0.0, "likewise, instead of KoLeo; FINO 0.05")
    spread_group: Count = option(16, "pictures among which KoLeo and SIGReg look; DINOv3 paper, section 3.2")
    gram: Literal["off", "start", "ema", "renew"] = option("off", "the teacher: start weights, EMA, a copy of the EMA")
    gram_weight: Weight = option(2.0, "v3")
    gram_begin_share: Share = option(0.0, "of the run, before Gram anchoring begins")
    gram_ramp_share: Share = option(0.0, "of the run, until it has its whole weight, by half a cosine; v3 0.005")
    gram_local_weight: Weight = option(1.0, "times local_weight, once Gram anchoring has its whole weight; v3 0.5")
    gram_renew_steps: Count = option(10_000, '"renew": copied from the EMA every so often; v3')
    gram_renewals: CountFrom0 = option(0, '"renew": so many times, then never again; 0: to the end; v3 3')
    gram_of: GramOf = option("patches", "similarities between these; v3")
    feature_weight: Weight = option(0.0, "distillation: the teacher's features, without heads")
    relation_weight: Weight = option(
        0.0, "distillation: the teacher's similarities between pictures and between patches"
    )

    dino_prototypes: Count = option(16_384, heading="heads and targets")
    ibot_prototypes: CountFrom0 = option(16_384, "0: DINO's head scores the patches too; DINOv2")
    head_hidden: Count = option(2048, "v3, the 7B 8192")
    head_bottleneck: Count = option(256, "v3, the 7B 512")
    ibot_hidden: CountFrom0 = option(0, "of iBOT's head; 0: as above; v3, the 7B 4096")
    ibot_bottleneck: CountFrom0 = option(0, "likewise; v3, the 7B 384")
    unit_prototypes: bool = option(True, "DINO v1; free ones (v3) take thousands of steps to say anything")
    standardise: bool = option(True, "the heads see tokens of mean 0 and variance 1")
    centring: Literal["sinkhorn", "centre"] = option("sinkhorn", "v3")
    student_temperature: Positive = option(0.1, "v3")
    teacher_temperature_start: Positive = option(0.04, "at first; v3")
    teacher_temperature: Positive = option(0.04, "v3 0.07")
    teacher_temperature_share: Share = option(0.1, "of the run, between the two; v3")

    tune: Literal["full", "last", "lora"] = option("full", heading="what is trained")
    tune_blocks: Count = option(4, '"last": so many blocks and the final norm')
    lora_rank: Count = 16
    freeze_share: Share = option(0.05, "heads alone at first: released backbones have none; FINO 0.4")
    ramp_share: Share = option(0.05, "until the backbone learns at full rate; FINO 0.04")
    freeze_prototypes_share: Share = option(0.0, "of the run, while they stay; v3 0.005 to 0.01, from scratch")
    drop_path: Share = option(0.0, "share of the pictures that a block leaves out; v3 0.3 to 0.4, from scratch")
    drop_path_grows: bool = option(False, "from 0 in the first block to that in the last; DINO v1")
    local_cls_norm: bool = option(False, "a final norm for local crops, where the weights have none; v3, the 7B")
    rope_rescale: float = option(2.0, "of the coordinates, drawn between 1/2 and 2; v3; 1 is off")

    lr_at_1024: Positive = option(
        4e-4,
        "times sqrt(batch_size / 1024); v3 writes a quarter of it and multiplies by 4",
        heading="optimiser (AdamW)",
    )
    lr_end_share: Weight = option(1.0, "of the last learning rate: 1 is constant after the warm-up; v3")
    head_lr: Positive = option(5.0, "of the heads, over that of the backbone: they are new")
    warmup_share: Share = option(0.1, "until the learning rate is whole; v3")
    warmup: Literal["line", "cosine"] = option("line", "its form; v3, the high-resolution stage by half a cosine")
    weight_decay: Weight = option(0.04, "v3")
    weight_decay_end: Weight = option(0.04, "v3")
    betas: Pair = option((0.9, 0.99), "v3")
    clip: Positive = option(3.0, "norm of the gradients of backbone and of each head; v3")
    layer_decay: Positive = option(0.98, "learning rate of a block over that of the next one; v3")
    patch_lr: Positive = option(0.2, "of the patch embedding; v3")
    ema_momentum: Share = option(
        0.98, "of the moving average; v3 0.994, of a run of 300 steps 0.95, or it stays behind"
    )
    ema_momentum_end: Share = option(0.998, "of a run of 300 steps 0.99")

    device: str = option("auto", heading="machine")
    precision: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto", "of the arithmetic; weights are never halved"
    )
    workers: CountFrom0 = option(2, "processes that prepare pictures")
    recompute: Recompute = option("cheap", "activations of blocks in the backward pass: memory against time")
    compile: bool = False
    engine: Literal["ddp", "fsdp"] = option("ddp", "under torchrun")

    log_steps: Count = option(10, heading="records")
    checkpoint_steps: Count = 500
    keep_checkpoints: Count = 2
    health_steps: Count = 200
    health_data: str = option(
        "", "held-out pictures, a folder per class, for 20-NN; empty: some of the training pictures"
    )
    health_pictures: Count = 512
    stop_on_collapse: bool = True

    def __post_init__(self) -> None:
        check(self)

    # --- what follows from the above -----------------------------------------------------------------------------

    def share(self, part: float) -> int:
        """Steps of a share of the run."""
        return round(part * self.steps)

    @property
    def lr(self) -> float:
        return self.lr_at_1024 * (self.batch_size / 1024) ** 0.5  # type: ignore[no-any-return]

    @property
    def distils(self) -> bool:
        return bool(self.teacher)

    @property
    def masks(self) -> bool:
        return self.ibot_weight > 0

    @property
    def looks_at_local_crops(self) -> bool:
        return self.num_local > 0 and self.dino_weight > 0

    @property
    def shares_head(self) -> bool:
        """Whether DINO's head scores the masked patches."""
        return self.masks and not self.ibot_prototypes

    def drop_paths(self, depth: int) -> float | list[float]:
        """One share for all blocks, or one for each of `depth`."""
        if not self.drop_path_grows:
            return self.drop_path
        return [self.drop_path * block / max(1, depth - 1) for block in range(depth)]

    @property
    def rope(self) -> RopeAugmentation | None:
        return None if self.rope_rescale == 1 else RopeAugmentation(rescale=self.rope_rescale)

    def view_configs(self, patch_size: int, teacher_patch: int, mean: Any, std: Any) -> list[tuple[float, ViewConfig]]:
        """(probability, views) for each resolution; sides are rounded to whole patches of the student."""
        wanted = [_sizes(text) for text in self.sizes] or [(self.global_px, self.local_px, self.gram_px, 1.0)]
        others = self.distils or self.gram in ("start", "renew")  # a teacher with crops of its own
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
        """A preset with changes.  Raises: InputError for a name or a field that does not exist."""
        check_choice("preset", name, PRESETS)
        known = {field.name for field in dataclasses.fields(cls)}
        for field in overrides:
            if field not in known:
                raise InputError(f"{field!r} is not a setting of the trainer; --help lists them")
        return cls(**(PRESETS[name] | overrides))


PRESETS: dict[str, dict[str, Any]] = {
    "adapt": {},
    # v3, ssl_default_config.yaml: its ViT-L recipe on ImageNet, for the architecture of the released models
    # differs: model.num_registers: source 0; ours 4; the released models have them
    # differs: model.key_bias: source true; ours false; likewise, they have none
    # differs: model.norm_eps: source 1e-06; ours 1e-05; likewise
    # differs: rope_rescale: source 1; ours 2; likewise, they were trained with it
    # differs: precision: source parameters, tokens and RoPE in bfloat16; ours products alone; weights stay float32
    # differs: schedules: source warm-up whole a step earlier, cosine not quite ended; ours ends; 1e-4 of the peak apart
    "dinov3": dict(
        from_scratch=True, model="vitl16", steps=125_000, batch_size=2048, dino_prototypes=65_536,
        ibot_prototypes=65_536, spread_group=64, freeze_share=0.0, ramp_share=0.0, freeze_prototypes_share=0.01,
        drop_path=0.3, lr_at_1024=4e-3, lr_end_share=1.767767e-4, weight_decay_end=0.4, betas=(0.9, 0.999),
        layer_decay=0.9, ema_momentum=0.992, ema_momentum_end=1.0, teacher_temperature=0.07,
        teacher_temperature_share=0.3, head_lr=1.0, unit_prototypes=False, standardise=False,
    ),
    # Feature form, AM-RADIO (arXiv 2312.06709): released teachers have no heads, without which the published form
    # (DINOv3 paper, section 5.2: the student's own heads against the teacher's) cannot be computed.
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
        raise InputError(f"sizes are 'global/local/gram:probability' such as '512/112/768:0.3'; got {text!r}") from None


def check(config: TrainConfig) -> None:
    """Raises InputError with one sentence for the first thing that cannot be meant."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if get_origin(field.type) is Literal:
            check_choice(field.name, value, field.type)
        for rule in getattr(field.type, "__metadata__", ()):
            if wrong := rule(value):
                raise InputError(f"{field.name} {wrong}")
    _ = config.rope, [_sizes(text) for text in config.sizes]  # which check themselves
    if config.batch_size < 2:
        raise InputError(f"batch_size is {config.batch_size}; the objectives compare pictures, so give at least 2")
    if config.batch_size % config.accumulate:
        raise InputError(f"batch_size {config.batch_size} does not split into {config.accumulate} equal parts")
    if config.distils and not (config.feature_weight or config.relation_weight):
        raise InputError("a teacher was given and no distillation weight; set feature_weight, or use preset 'distill'")
    if not config.distils and (config.feature_weight or config.relation_weight):
        raise InputError("distillation needs teacher=, a name, path or hub id of a backbone")
    if config.gram == "start" and config.from_scratch:
        raise InputError("gram='start' holds on to the start weights, and these are random; use 'renew' or 'ema'")
    if config.tune == "lora" and config.engine == "fsdp":
        raise InputError("adapters are small enough for engine='ddp'; 'fsdp' does not split them")
    if config.local_cls_norm and not config.looks_at_local_crops:
        raise InputError("local_cls_norm is for local crops, which DINO's loss looks at; set num_local and dino_weight")
    if config.shares_head and (config.ibot_hidden or config.ibot_bottleneck):
        raise InputError(
            "with ibot_prototypes=0 the patches have DINO's head; leave ibot_hidden and ibot_bottleneck out"
        )
    if config.gram_renewals and config.gram != "renew":
        raise InputError(f"gram_renewals counts the copies of gram='renew', and gram is {config.gram!r}; leave it out")
    if config.ibot_weight and not config.mask_share:
        raise InputError("ibot_weight is above 0 and mask_share is 0, so that nothing is masked; set ibot_weight=0")
    if not any((config.dino_weight, config.ibot_weight, config.feature_weight, config.relation_weight)):
        raise InputError("no objective has a weight; give dino_weight, ibot_weight or feature_weight")
