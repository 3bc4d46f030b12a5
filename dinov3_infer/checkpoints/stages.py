"""The config of a stored ConvNeXt, and the config.json that describes it to transformers."""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..model.convnext import ConvNeXtConfig
from .reading import Checkpoint
from .recognise import Stored

__all__ = ["hf_stages", "stage_eps", "stages_shown"]

_LONGEST = 2**18  # largest dimension
_STRANGERS = (  # (pattern of a tensor name, the network that has it)
    (r"\.grn\.", "a ConvNeXt V2, whose blocks have another normalisation"),
    (r"\.conv_dw\.bn\.|\.norm\.running_mean", "a ConvNeXt with batch norm"),
)


def stages_shown(stored: Stored, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ConvNeXtConfig that the tensors show.

    Raises:
        CheckpointError: The tensors are no whole ConvNeXt, or contradict config.json.
        UnsupportedError: The network is a relative of ConvNeXt.
    """
    for pattern, what in _STRANGERS:
        if (name := next((name for name in stored.shapes if re.search(pattern, name)), None)) is not None:
            raise UnsupportedError(f"it is {what} ('{name}'), which is not supported")
    depths: list[int] = []
    widths: list[int] = []
    for stage in range(4):
        conv = _shape(stored, f"downsample_layers.{stage}.{0 if stage == 0 else 1}.weight", 4)
        side, before = (4, 3) if stage == 0 else (2, widths[-1])
        if conv[1:] != (before, side, side):
            raise UnsupportedError(
                f"the convolution before stage {stage} has shape {list(conv)}; a ConvNeXt of DINOv3 has "
                f"[C, {before}, {side}, {side}] there"
            )
        numbers = [
            n for n in range(stored.depth) if _name(stored, f"stages.{stage}.{n}.dwconv.weight") in stored.shapes
        ]
        _shape(stored, f"stages.{stage}.0.pwconv1.weight", 2)
        depths.append(max(numbers, default=0) + 1)
        widths.append(conv[0])
    shown = {"depths": tuple(depths), "widths": tuple(widths)}
    for name, ours in (("depths", "depths"), ("hidden_sizes", "widths")):
        said = config.get(name) if config.get("model_type") == "dinov3_convnext" else None
        if said is not None and (not isinstance(said, (list, tuple)) or tuple(said) != shown[ours]):
            raise CheckpointError(
                f"config.json says {name} {reprlib.repr(said)} and the tensors {list(shown[ours])}; "
                "is the file complete?"
            )
    return shown


def _name(stored: Stored, ours: str) -> str:
    return stored.parts[ours].names[0]


def _shape(stored: Stored, ours: str, dimensions: int) -> tuple[int, ...]:
    name = _name(stored, ours)
    found = stored.shapes.get(name)
    if found is None or len(found) != dimensions or 0 in found or max(found) > _LONGEST:
        fault = "missing" if found is None else f"of shape {list(found)}"
        raise CheckpointError(
            f"the names fit layout {stored.layout.label}, but '{name}' is {fault}; is the file complete?"
        )
    return found


def stage_eps(checkpoint: Checkpoint) -> dict[str, float]:
    """The epsilon of the norms if a live module or config.json states it, else {}; all released models have 1e-6.

    Raises: CheckpointError if the epsilon is no number in 0..1, UnsupportedError for an activation other than "gelu".
    """
    if (activation := checkpoint.config.get("hidden_act", "gelu")) != "gelu":
        raise UnsupportedError(f"config.json asks for the activation {reprlib.repr(activation)}; a ConvNeXt has 'gelu'")
    said = checkpoint.known.get("norm_eps", checkpoint.config.get("layer_norm_eps"))
    if said is None:
        return {}
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not 0 < said < 1:
        raise CheckpointError(
            f"config.json gives layer_norm_eps as {reprlib.repr(said)}, which should be a number above 0 and below 1"
        )
    return {"norm_eps": float(said)}


def hf_stages(config: ConvNeXtConfig) -> dict[str, Any]:
    """The config.json of transformers."""
    return {
        "architectures": ["DINOv3ConvNextModel"], "model_type": "dinov3_convnext", "num_channels": 3,
        "depths": list(config.depths), "hidden_sizes": list(config.widths), "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps, "layer_scale_init_value": 1e-6, "drop_path_rate": 0.0,
        "initializer_range": 0.02, "image_size": 224,
    }  # fmt: skip
