"""A live module of transformers, timm or Meta, seen as a checkpoint."""

from typing import Any

from torch import nn

from .layouts import LayoutName
from .reading import Checkpoint, TensorsInMemory
from .recognise import layout_hint

__all__ = ["open_module"]


def open_module(model: nn.Module) -> Checkpoint:
    """Its own tensors, not copies of them, and what it knows besides."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    stated = [c.to_dict() for c in configs if hasattr(c, "to_dict") and layout_hint(c.to_dict()) == "hf"]
    return Checkpoint(
        f"a live {type(model).__name__}",
        TensorsInMemory(model.state_dict(keep_vars=True)),
        config=stated[0] if stated else _timm_settings(model),
        layout=_live_layout(model),
        known={} if stated else _live_settings(model),
    )


def _live_settings(model: nn.Module) -> dict[str, Any]:
    """What a timm or Meta module knows and its tensors do not show."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith("blocks.0.attn") and isinstance(getattr(module, "num_heads", None), int):
            found["num_heads"] = module.num_heads
        if name.endswith("blocks.0.norm1") and isinstance(getattr(module, "eps", None), float):
            found["norm_eps"] = module.eps
    return found


def _timm_settings(model: nn.Module) -> dict[str, Any]:
    """timm's config.json of a live module, as far as it knows which weights it holds."""
    found = (getattr(module, "pretrained_cfg", None) for module in model.modules())
    cfg: Any = next((c for c in found if c), {})
    return {"pretrained_cfg": dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg)} if cfg else {}


def _live_layout(model: nn.Module) -> LayoutName | None:
    origins = {type(module).__module__.split(".")[0] for module in model.modules()}
    return "timm" if "timm" in origins else "hf" if "transformers" in origins else None
