"""Settings and presets."""

from dataclasses import fields

import pytest
from pictures import complaint

from dinov3_infer.errors import InputError
from dinov3_infer.train.config import PRESETS, TrainConfig


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_whole(name: str) -> None:
    """Every preset is valid; distillation needs a teacher."""
    config = TrainConfig.preset(name, **({"teacher": "dinov2_vits14"} if name == "distill" else {}))
    assert TrainConfig(**{**vars(config)}) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(local_px=-96), "local_px is -96; give 0 or more"),
        (dict(mask_share=1.5), "mask_share is 1.5"),
        (dict(koleo_weight=-1.0), "koleo_weight is -1"),
        (dict(lr_at_1024=float("nan")), "lr_at_1024 is nan"),
        (dict(global_scale=(0.5, 0.1)), "global_scale is a range"),
        (dict(centring="middle"), "centring is one of sinkhorn, centre"),
        (dict(gram="start", from_scratch=True), "random"),
        (dict(dino_weight=0.0, ibot_weight=0.0), "no objective"),
        (dict(mask_share=0.0), "nothing is masked"),
        (dict(feature_weight=1.0), "teacher="),
        (dict(teacher="dinov2_vits14"), "feature_weight and relation_weight are 0"),
        (dict(tune="lora", engine="fsdp"), "ddp"),
        (dict(gram="ema", gram_renewals=3), "needs gram='renew'"),
        (dict(ibot_prototypes=0, ibot_hidden=8), "shares the DINO head"),
        (dict(local_cls_norm=True, num_local=0), "num_local"),
        (dict(sizes=("512x112",)), "global/local/gram"),
        (dict(colour=1), "'colour' is not a setting"),
        (dict(rope_rescale=0.5), "rescale"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_settings_that_cannot_be_meant(changes: dict, words: str) -> None:
    assert words in complaint(InputError, lambda: TrainConfig.preset("adapt", **changes))


def test_every_number_says_which_values_it_takes() -> None:
    """The type gives the range; seed takes any integer, and `RopeAugmentation` and AdamW check the others."""
    bare = {field.name for field in fields(TrainConfig) if field.type in (int, float, tuple[float, float])}
    assert bare == {"seed", "rope_rescale", "betas"}


def test_views_follow_the_patches() -> None:
    """Sides are rounded to whole patches; a teacher with another patch size gets the same grid."""
    config = TrainConfig.preset("distill", teacher="dinov2_vits14")
    [(probability, views)] = config.view_configs(16, 14, (0, 0, 0), (1, 1, 1))
    assert (probability, views.global_px, views.gram_px, views.num_local) == (1.0, 128, 112, 0)
    assert views.jitter_probability == views.grey == views.solarize == views.local_blur == views.mask_probability == 0
    [(_, views)] = TrainConfig().view_configs(14, 14, (0, 0, 0), (1, 1, 1))
    assert (views.global_px, views.local_px, views.gram_px) == (224, 98, None)
    assert views.local_blur and views.grey and views.solarize
    [(_, views)] = TrainConfig(blur=False).view_configs(14, 14, (0, 0, 0), (1, 1, 1))
    assert views.local_blur == sum(views.global_blur) == 0 and views.grey and views.solarize
    mixed = TrainConfig(gram="start", sizes=("512/112/768:0.3", "768/336/1152:0.05"))
    found = mixed.view_configs(16, 16, (0, 0, 0), (1, 1, 1))
    assert [(p, v.global_px, v.local_px, v.gram_px) for p, v in found] == [(0.3, 512, 112, 768), (0.05, 768, 336, 1152)]


def test_drop_path_is_one_for_all_blocks_or_grows() -> None:
    assert TrainConfig(drop_path=0.3).drop_paths(12) == 0.3
    grown = TrainConfig(drop_path=0.1, drop_path_grows=True)
    assert grown.drop_paths(11) == pytest.approx([block / 100 for block in range(11)])
    assert grown.drop_paths(1) == [0.0]


def test_the_learning_rate_follows_the_batch() -> None:
    assert TrainConfig(lr_at_1024=4e-4, batch_size=4096).lr == pytest.approx(8e-4)
    assert TrainConfig(lr_at_1024=4e-4, batch_size=64).lr == pytest.approx(1e-4)
