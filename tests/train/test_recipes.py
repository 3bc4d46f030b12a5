"""Each recipe that names a source beside it, setting by setting and step by step: what differs is said, in one line
with the source's value, ours, and why.
"""

import json
import re
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from published import RECIPES, Recipe
from repository import ROOT

from dinov3_infer.model.vit import ViTConfig
from dinov3_infer.train import optim
from dinov3_infer.train.command import parse
from dinov3_infer.train.config import PRESETS, TrainConfig
from dinov3_infer.zoo import find

CONFIGS = ROOT / "examples" / "configs"
LINE = re.compile(r"^\s*# differs: ([\w. ]+): source (.+?); ours (.+?); (.+)$", re.MULTILINE)
MACHINE = {
    "data", "out", "teacher", "accumulate", "seed", "device", "precision", "workers", "recompute", "compile", "engine",
    "log_steps", "checkpoint_steps", "keep_checkpoints", "health_steps", "health_data", "health_pictures",
    "stop_on_collapse", "levels",
}  # fmt: skip  # no part of a recipe
OF_LORA, OF_LAST, OF_SIZES = {"lora_rank"}, {"tune_blocks"}, {"global_px", "local_px", "gram_px"}
by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def text_of(recipe: Recipe) -> str:
    """The file of a recipe, or the comment above the preset."""
    if recipe.name not in PRESETS:
        return (CONFIGS / f"{recipe.name}.toml").read_text(encoding="utf-8")
    code = (ROOT / "dinov3_infer" / "train" / "config.py").read_text(encoding="utf-8")
    above = code[: code.index(f'    "{recipe.name}": dict(')]
    return above[above.rindex("},\n") :]


def config_of(recipe: Recipe) -> TrainConfig:
    if recipe.name in PRESETS:
        return TrainConfig.preset(recipe.name)
    return parse(["--config", str(CONFIGS / f"{recipe.name}.toml")])[0]


def said(recipe: Recipe) -> dict[str, tuple[str, str]]:
    found = LINE.findall(text_of(recipe))
    assert len(found) == text_of(recipe).count("# differs:"), "a line has another form"
    assert len({name for name, *_ in found}) == len(found)
    return {name: (source, ours) for name, source, ours, _ in found}


def shown(value: Any) -> str:
    """A value as the lines of a recipe write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def same(ours: Any, source: Any) -> bool:
    if isinstance(source, tuple) and len(source) == len(ours):
        return all(map(same, ours, source))
    if isinstance(source, float) and isinstance(ours, int | float):
        return bool(ours == pytest.approx(source, rel=1e-6))
    return bool(ours == source)


def unused(config: TrainConfig) -> set[str]:
    """Settings that have no effect beside these others."""
    known = {field.name for field in fields(config)}
    return (
        {name for name in known if name.startswith("gram_") and config.gram == "off"} - {"gram_px"}
        | {name for name in known if name.startswith(("ibot_", "mask_")) and not config.ibot_weight} - {"ibot_weight"}
        | ({"ibot_hidden", "ibot_bottleneck"} if config.shares_head else set())
        | (set() if config.koleo_weight or config.sigreg_weight else {"spread_group"})
        | (set() if config.gram == "renew" else {"gram_renew_steps"})
        | (OF_SIZES if config.sizes else set())
        | (set() if config.tune == "lora" else OF_LORA)
        | (set() if config.tune == "last" else OF_LAST)
    )


def in_effect(config: TrainConfig, name: str) -> Any:
    """The value of a setting; 0 may stand for that of another setting."""
    other = {"ibot_hidden": config.head_hidden, "ibot_bottleneck": config.head_bottleneck}
    return getattr(config, name) or other.get(name, getattr(config, name))


@by_name
def test_settings_are_the_sources_or_the_difference_is_said(recipe: Recipe) -> None:
    config, lines = config_of(recipe), said(recipe)
    model: ViTConfig = replace(find(config.model).config, local_cls_norm=config.local_cls_norm)
    pairs = {n: (in_effect(config, n), v) for n, (v, _) in recipe.settings.items() if n not in unused(config)}
    pairs |= {f"model.{name}": (getattr(model, name), value) for name, (value, _) in recipe.model.items()}
    different = {name: (shown(source), shown(ours)) for name, (ours, source) in pairs.items() if not same(ours, source)}
    assert {name: line for name, line in lines.items() if name not in recipe.others} == different
    assert {name for name in lines if name in recipe.others} == set(recipe.others)


@by_name
def test_no_setting_is_left_out(recipe: Recipe) -> None:
    """Each setting that changes the numbers of a run has a value of the source, with its line."""
    config = config_of(recipe)
    known = {field.name for field in fields(TrainConfig)}
    assert known - MACHINE - unused(config) == set(recipe.settings) - unused(config)
    assert known >= MACHINE and all(where for _, where in (recipe.settings | recipe.model).values())


def test_every_recipe_with_a_source_is_compared() -> None:
    cited = {path.stem for path in CONFIGS.glob("*.toml") if "facebookresearch/" in path.read_text(encoding="utf-8")}
    assert cited | {"dinov3"} == {recipe.name for recipe in RECIPES}
    for recipe in RECIPES:
        repository, _, rest = recipe.source.partition(" at ")
        assert recipe.name in PRESETS or repository in text_of(recipe)


def rates(config: TrainConfig, step: int) -> tuple[float, float]:
    """Learning rates of the final norm and of the prototypes, by step."""
    groups = [dict(rate=1.0, decays=False, backbone=True, prototypes=False),
              dict(rate=config.head_lr, decays=False, backbone=False, prototypes=True)]  # fmt: skip
    optim.set_rates(SimpleNamespace(param_groups=groups), config, step)  # type: ignore[arg-type]
    return groups[0]["lr"], groups[1]["lr"] / config.head_lr


def looked_at(total: int) -> list[int]:
    """Steps all along a run, and each step near its ends and near changes of a schedule."""
    edges = [0, *(round(total * share) for share in (0.005, 0.01, 0.05, 0.1, 1 / 3, 0.3)), 1000, 11_000, total - 1]
    near = {step for edge in edges for step in range(edge - 60, edge + 61)}
    return sorted(step for step in near | set(range(0, total, max(1, total // 20_000))) if 0 <= step < total)


@by_name
def test_schedules_over_their_whole_length(recipe: Recipe) -> None:
    config, source = config_of(recipe), recipe.schedules()
    functions: dict[str, Any] = {name: getattr(optim, name, None) for name in source}
    functions |= {"learning_rate": lambda c, s: rates(c, s)[0], "prototypes": lambda c, s: rates(c, s)[1]}
    allowed = {name for name in said(recipe) if name in ("freeze_share", "gram_begin_share")}
    assert bool(recipe.equal_from) == bool(allowed)
    assert bool(recipe.tolerance) == ("schedules" in said(recipe))
    for name, values in source.items():
        if name == "renewals":
            continue
        assert len(values) == config.steps
        steps = [step for step in looked_at(config.steps) if step >= recipe.equal_from]
        found = np.array([functions[name](config, step) for step in steps])
        bound = recipe.tolerance.get(name, 1e-12) * np.abs(values).max()
        assert np.abs(found - values[steps]).max() <= bound, name


def test_gram_anchoring_has_the_published_form_once_it_begins() -> None:
    """Weights step by step, and renewals of the teacher, counted from the beginning of anchoring."""
    [recipe] = [recipe for recipe in RECIPES if recipe.name == "dinov3_gram"]
    config, source = config_of(recipe), recipe.schedules()
    begin = config.share(config.gram_begin_share)
    for name, function in (("gram_weight", optim.gram_weight), ("local_weight", optim.local_weight)):
        found = np.array([function(config, begin + step) for step in range(2000)])
        assert np.abs(found - source[name][:2000]).max() < 1e-12, name
        assert function(config, begin - 1) == source[name][0]
    renewed = [step + 1 - begin for step in range(config.steps) if optim.renews_gram(config, step)]
    assert renewed == [0, *source["renewals"]]  # at 0 it becomes what it is, since nothing has moved


@pytest.mark.parametrize("name", [*PRESETS, *(path.stem for path in sorted(CONFIGS.glob("*.toml")))])
def test_new_heads_do_not_move_released_weights_at_once(name: str) -> None:
    """A run from released weights, which have no heads, trains only the heads at first."""
    given = ["--preset", name] if name in PRESETS else ["--config", str(CONFIGS / f"{name}.toml")]
    config, _ = parse([*given, *(["--teacher", "dinov2_vits14"] if name == "distill" else [])])
    if config.from_scratch or not (config.dino_weight or config.ibot_weight):
        return
    alone = config.share(config.freeze_share)
    assert alone >= 0.04 * config.steps
    assert rates(config, alone - 1)[0] == 0.0 and rates(config, alone // 2)[1] > 0.0
    assert rates(config, alone + config.share(config.ramp_share))[0] > 0.0


def test_the_short_run_is_the_recorded_one() -> None:
    """The comment of the recipe quotes the minutes and 20-NN of the record."""
    record = json.loads((ROOT / "tests" / "benchmarks" / "records" / "adaptation.json").read_text(encoding="utf-8"))
    config, recorded = parse(["--config", str(CONFIGS / "short_cpu.toml")])[0], record["plain"]["settings"]
    ours = {field.name: getattr(config, field.name) for field in fields(config)}
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in recorded.items() if name in ours}
    assert len(settings) > 70 and {name: ours[name] for name in settings} == settings
    text = (CONFIGS / "short_cpu.toml").read_text(encoding="utf-8")
    accuracies = [record[run]["cifar10"]["6000/3000"]["knn"][0] for run in ("start", "plain")]
    assert "from {:.3f} to {:.3f}".format(*accuracies) in text
    assert all(f"{record[run]['minutes']:.0f} minutes" in text for run in ("plain", "gram"))


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
def test_what_is_marked_as_published_is(name: str) -> None:
    """A default whose text ends with "as DINOv3" is a value of at least one of the published configurations."""
    [field] = [field for field in fields(TrainConfig) if field.name == name]
    if not field.metadata.get("text", "").endswith("as DINOv3"):
        return
    values = [recipe.settings[name][0] for recipe in RECIPES[:4] if name in recipe.settings]
    assert any(same(field.default, value) for value in values), values
