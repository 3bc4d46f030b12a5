"""Backbone and head as one folder that transformers loads."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbone import Backbone
from ..checkpoints.architecture import reading_differs
from ..checkpoints.config_json import hf_config
from ..checkpoints.layouts import layout_for
from ..checkpoints.saving import our_block, restore, write_folder
from ..errors import InputError
from ..images.preprocess import Preprocess

__all__ = ["FORMS", "Form", "save_as_transformers"]

log = logging.getLogger("dinov3_infer")


class Form(NamedTuple):
    """What transformers has a head as."""

    prefix: str  # of the backbone's tensors
    tensors: dict[str, Tensor]  # of the head, under the names of transformers
    config: dict[str, Any]  # config.json
    processor: dict[str, Any]  # preprocessor_config.json


def save_as_transformers(
    form: Form, backbone: Backbone, facts: Mapping[str, Any], folder: str | os.PathLike[str]
) -> Path:
    """Writes config.json, preprocessor_config.json and model.safetensors.

    `facts`: what the head says of itself, for the header of the weights file.

    Raises: InputError for a target that is a file.
    """
    target = Path(folder).expanduser()
    if target.is_file():
        raise InputError(f"transformers' layout is a folder, and '{target}' is a file; give another path")
    state = {name: tensor.detach().cpu() for name, tensor in backbone.state_dict().items()}
    layout = layout_for(backbone.config, "hf")
    tensors, notes = restore(state, backbone.config, layout)
    for note in notes + reading_differs(backbone.config, layout):
        log.warning("%s: %s", target, note)
    named = {f"{form.prefix}.{name}": tensor for name, tensor in tensors.items()}
    named |= {name: tensor.detach().cpu().contiguous() for name, tensor in form.tensors.items()}
    block = our_block(backbone, backbone._named(), backbone.preprocess)
    dtype = str(backbone.main_weight.dtype).removeprefix("torch.")
    config = form.config | {"dtype": dtype, "dinov3_infer": block}
    write_folder(target, named, facts, {"config.json": config, "preprocessor_config.json": form.processor})
    return target


def _classifier(
    backbone: Backbone, state: Mapping[str, Tensor], options: Mapping[str, Any], seen: Preprocess, names: Sequence[str]
) -> Form:
    """`Dinov2ForImageClassification`, or that with registers."""
    config = hf_config(backbone.config)
    architecture = config["architectures"][0].replace("Model", "ForImageClassification")
    labels = {str(i): name for i, name in enumerate(names)}
    config |= {"architectures": [architecture], "id2label": labels, "label2id": {n: int(i) for i, n in labels.items()}}
    processor = _levels(seen) | {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "resample": 3,
        "do_resize": True, "size": {"shortest_edge": seen.resize_to},
        "do_center_crop": True, "crop_size": {"height": seen.size, "width": seen.size},
    }  # fmt: skip
    return Form(config["model_type"], {f"classifier.{n}": t for n, t in state.items()}, config, processor)


_DEPTH_NAMES = (  # ours, and transformers'
    (r"reassemble_blocks\.projects\.(\d)\.conv", r"{neck}.reassemble_stage.layers.\1.projection"),
    (r"reassemble_blocks\.resize_layers\.(\d)", r"{neck}.reassemble_stage.layers.\1.resize"),
    (r"reassemble_blocks\.readout_projects", r"{neck}.reassemble_stage.readout_projects"),
    (r"convs\.(\d)\.conv", r"{neck}.convs.\1"),
    (r"fusion_blocks\.(\d)\.project\.conv", r"{fusion}.\1.projection"),
    (r"fusion_blocks\.(\d)\.res_conv_unit(\d)\.conv(\d)\.conv", r"{fusion}.\1.residual_layer\2.convolution\3"),
    (r"project\.conv", r"head.projection"),
    (r"conv_depth\.head", r"{last}"),
)


def _dpt(
    backbone: Backbone, state: Mapping[str, Tensor], options: Mapping[str, Any], seen: Preprocess, names: Sequence[str]
) -> Form:
    """`DPTForDepthEstimation`.

    Its depth lacks our 0.001, the clamp to the range of the data and the way back to the size of the image.
    """
    dpt = options["dpt"]
    tensors = _renamed(state, neck="neck", fusion="neck.fusion_stage.layers", last="head.head")
    for i in (1, 2):  # its class has these and never calls them
        like = tensors[f"neck.fusion_stage.layers.1.residual_layer1.convolution{i}.weight"]
        tensors[f"neck.fusion_stage.layers.0.residual_layer1.convolution{i}.weight"] = torch.zeros_like(like)
    config = {
        "architectures": ["DPTForDepthEstimation"], "model_type": "dpt",
        "backbone_config": _backbone(backbone, options["blocks"], apply_layernorm=False, reshape_hidden_states=False),
        "backbone_out_indices": None, "hidden_size": backbone.embed_dim, "patch_size": backbone.patch_size,
        "neck_hidden_sizes": list(dpt["channels"]), "fusion_hidden_size": dpt["inner"], "add_projection": True,
        "use_bias_in_fusion_residual": False, "use_batch_norm_in_fusion_residual": False, "readout_type": "project",
        "reassemble_factors": [4, 2, 1, 0.5], "is_hybrid": False,
    }  # fmt: skip
    processor = {
        "image_processor_type": "DPTImageProcessor", "do_resize": False, "do_rescale": False, "do_normalize": True,
        "image_mean": [round(255 * v, 3) for v in seen.mean], "image_std": [round(255 * v, 3) for v in seen.std],
        "do_pad": True, "size_divisor": backbone.patch_size,
    }  # fmt: skip
    return Form("backbone", tensors, config, processor)


def _canopy(
    backbone: Backbone, state: Mapping[str, Tensor], options: Mapping[str, Any], seen: Preprocess, names: Sequence[str]
) -> Form:
    """`CHMv2ForDepthEstimation`."""
    dpt, (least, most) = options["dpt"], options["range"]
    inside = dict(apply_layernorm=True, reshape_hidden_states=True, return_class_token=True)
    config = {
        "architectures": ["CHMv2ForDepthEstimation"], "model_type": "chmv2", "patch_size": backbone.patch_size,
        "backbone_config": _backbone(backbone, options["blocks"], **inside),
        "post_process_channels": list(dpt["channels"]), "fusion_hidden_size": dpt["inner"],
        "head_hidden_size": dpt["hidden"], "number_output_channels": options["outputs"], "readout_type": "project",
        "reassemble_factors": [4, 2, 1, 0.5], "min_depth": least, "max_depth": most,
        "bins_strategy": "chmv2_mixlog", "norm_strategy": "chmv2_mixlog",
    }  # fmt: skip
    processor = _levels(seen) | {
        "image_processor_type": "CHMv2ImageProcessor", "do_resize": False, "do_pad": True,
        "size_divisor": backbone.patch_size,
    }  # fmt: skip
    tensors = _renamed(state, neck="head", fusion="head.fusion_layers", last="head.conv_depth.head")
    return Form("backbone", tensors, config, processor)


FORMS: dict[str, Callable[..., Form]] = {"classifier": _classifier, "dpt": _dpt, "chmv2": _canopy}


def _backbone(backbone: Backbone, blocks: tuple[int, ...], **options: bool) -> dict[str, Any]:
    """Its section of config.json; transformers counts the embedding as the first block."""
    config = hf_config(backbone.config)
    config.pop("architectures")
    stages = ["stem", *(f"stage{i + 1}" for i in range(backbone.n_blocks))]
    indices = [block + 1 for block in blocks]
    names = {"stage_names": stages, "out_indices": indices, "out_features": [stages[i] for i in indices]}
    return config | names | options


def _renamed(state: Mapping[str, Tensor], **places: str) -> dict[str, Tensor]:
    found = {}
    for ours, tensor in state.items():
        pattern, theirs = next((p, t) for p, t in _DEPTH_NAMES if re.match(rf"{p}\.", ours))
        found[re.sub(f"^{pattern}", theirs.format(**places), ours)] = tensor
    return found


def _levels(seen: Preprocess) -> dict[str, Any]:
    return {
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(seen.mean), "image_std": list(seen.std),
    }  # fmt: skip
