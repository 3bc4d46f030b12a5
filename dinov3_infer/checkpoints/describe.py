"""Decides what a checkpoint is before any tensor is read: layout, network, model of the zoo, and transform."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import CheckpointError, InputError, UnsupportedError
from ..images.preprocess import Preprocess
from ..zoo import Config, ModelInfo, Style, find_architecture
from .architecture import architecture, looks_like
from .identity import identify, our_block
from .layouts import LayoutName
from .reading import Checkpoint, TensorsInMemory
from .recognise import Stored, layout_hint, recognise
from .refusals import refuse_config
from .transforms import shown, stated_transform

__all__ = ["Description", "describe", "open_module"]

log = logging.getLogger("dinov3_infer")


@dataclass(frozen=True)
class Description:
    """The description of a checkpoint."""

    path: str
    stored: Stored  # its tensors
    config: Config
    info: ModelInfo | None  # the model that these weights are, with its licence; None for unnamed weights
    preprocess: Preprocess
    rope_periods: Any  # periods from our block of config.json, if it has any
    origin: dict[str, str]  # field -> its value and source


def describe(
    checkpoint: Checkpoint,
    *,
    layout: LayoutName | None = None,
    expected: ModelInfo | None = None,
    preprocessing: Style | None = None,
    num_heads: int | None = None,
) -> Description:
    """Describe a checkpoint.

    Args:
        layout: The layout, if the caller states it.
        expected: The model that the caller asked for; a file of another size is refused with both names.
        preprocessing: "meta", "hf" or "timm" for the transform of that library.
        num_heads: The number of heads, if nothing in or beside the file states it.

    Raises:
        CheckpointError: The tensors and configs do not fit each other.
        UnsupportedError: The network is not supported.
        InputError: The model does not have this `preprocessing`.
    """
    stored = recognise(checkpoint, layout or checkpoint.layout, named=expected is not None)
    like = find_architecture(str(checkpoint.config.get("architecture"))) or expected
    try:
        config, origin = architecture(stored, checkpoint, expected, like, num_heads)
    except (CheckpointError, InputError) as error:
        raise CheckpointError(f"'{checkpoint.path}' does not fit: {error}") from None
    except UnsupportedError as error:
        raise UnsupportedError(f"'{checkpoint.path}': {error}") from None
    info, named_by = identify(checkpoint, config, expected)
    ours = our_block(checkpoint)
    preprocess, of_transform = stated_transform(checkpoint, config, info, preprocessing, ours)
    found = {name: f"{getattr(config, name)}, from {where}" for name, where in origin.items()}
    levels = of_transform["mean and std"]
    found |= {"transform": f"{shown(preprocess)}, from {of_transform['transform']}"}
    found |= {"mean and std": f"{_numbers(preprocess.mean)} and {_numbers(preprocess.std)}, from {levels}"}
    origin = {
        "layout": f"{stored.layout.label}, from {'layout=' if layout else 'the names of the tensors'}",
        "architecture": f"{looks_like(vars(config)).removeprefix('looks like ')}, from the shapes of the tensors",
        **found,
        "name": f"{info.title}, from {named_by}" if info is not None else f"none: {named_by}",
        "licence": f"{info.licence}, from the name" if info is not None else "not stated",
    }
    unsaid = {name: text for name, text in origin.items() if "default" in text}
    if unsaid:
        log.warning(
            "%s: nothing states the %s; used: %s",
            checkpoint.path, " and the ".join(unsaid), "; ".join(unsaid.values()),
        )  # fmt: skip
    return Description(checkpoint.path, stored, config, info, preprocess, ours.get("rope_periods"), origin)


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def open_module(model: nn.Module) -> Checkpoint:
    """Open a live module of transformers, timm or Meta as a checkpoint: its tensors and settings.

    Raises: UnsupportedError if its config is that of an unsupported model.
    """
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    every = [c.to_dict() for c in configs if hasattr(c, "to_dict")]
    for outermost in every[:1]:
        refuse_config(outermost, f"a live {type(model).__name__}")
    stated = [c for c in every if layout_hint(c) == "hf"] or [c for c in every if c.get("num_attention_heads")]
    origins = {type(module).__module__.split(".")[0] for module in model.modules()}
    return Checkpoint(
        f"a live {type(model).__name__}",
        TensorsInMemory(model.state_dict(keep_vars=True)),
        config=stated[0] if stated else _timm_config(model),
        layout="timm" if "timm" in origins else "hf" if "transformers" in origins else None,
        known={} if stated else _settings(model),
    )


def _settings(model: nn.Module) -> dict[str, Any]:
    """Settings of a timm or Meta module that its tensors do not show."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith("blocks.0.attn") and isinstance(getattr(module, "num_heads", None), int):
            found["num_heads"] = module.num_heads
        if re.search(r"blocks\.0\.norm1$|stages\.0\.(blocks\.)?0\.norm$", name) and isinstance(
            getattr(module, "eps", None), float
        ):
            found["norm_eps"] = module.eps
    return found


def _timm_config(model: nn.Module) -> dict[str, Any]:
    """timm's config.json for a live module, if the module knows which weights it holds."""
    cfg: Any = next((c for module in model.modules() if (c := getattr(module, "pretrained_cfg", None))), {})
    return {"pretrained_cfg": dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg)} if cfg else {}
