"""The contestants of `dinov3-infer bench`: each installed library, in each of its modes.

All have the same weights and get the same pixels.  A library is imported when its first contestant is called.  A
contestant that cannot be built or run is refused with the reason; the others continue.
"""

import copy
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ...backbone import Backbone, ViTBackbone
from ...errors import InputError, UnsupportedError
from .contest import Cell
from .engines import of_onnxruntime, of_openvino
from .repairs import mend_torchvision
from .setup import Call, Contestant, Precision, Setup, quiet

__all__ = ["cell_of", "contestants", "timm_model"]

# largest 1 - cosine of the worst token, by precision; a wrong computation exceeds it by far
LIMITS: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 3e-2, "int8": 2e-1}
OTHER_RULE = 5e-2  # the same where positions are resized, which each library does in another way
MODES: dict[Precision, str] = {"float32": "exact", "bfloat16": "fast", "int8": "int8"}  # our modes on a CPU
WAYS: tuple[tuple[Precision, str], ...] = (("float32", ""), ("bfloat16", "cast"), ("bfloat16", "autocast"))
# reduce-overhead uses CUDA graphs; on a CPU it equals default
COMPILE = {"cpu": ("default", "max-autotune"), "cuda": ("default", "reduce-overhead", "max-autotune")}


def contestants(setup: Setup) -> list[Contestant]:
    """The contestants of all installed libraries, ours first."""
    found = [*_ours(setup), *_transformers(setup), *_timm(setup), *_reference(setup)]
    if setup.device.type == "cpu":
        found += [*of_onnxruntime(setup), *of_openvino(setup)]
    return [one for one in found if one.precision in setup.precisions]


def cell_of(setup: Setup, taking_part: list[Contestant]) -> Cell:
    """The contest as a cell; the error of a contestant is 1 - cosine of its worst class or patch token."""
    pixels = torch.rand(setup.batch, 3, *setup.size, generator=torch.Generator().manual_seed(0)).to(setup.device)
    prefix = setup.model.num_prefix_tokens
    judge = copy.deepcopy(setup.model)
    if isinstance(judge, ViTBackbone):
        judge.set_attention("eager")
    with torch.no_grad():
        exact = _tokens(judge(pixels), prefix)

    def error(output: Any) -> float:
        tokens = _tokens(output, prefix)
        if tokens.shape != exact.shape or not bool(tokens.isfinite().all()):
            return float("inf")
        return 1.0 - float(cosine_similarity(tokens.double(), exact.double(), dim=-1).min())

    limits = {one.label: LIMITS[one.precision] for one in taking_part}
    if setup.resized:
        limits |= {one.label: max(OTHER_RULE, limits[one.label]) for one in taking_part if one.library != "ours"}
    what = dict(pixels=list(setup.size), batch=setup.batch)
    return Cell(what, [pixels], {one.label: _lazy(one.build) for one in taking_part}, error, limits)


def _lazy(build: Callable[[], Call]) -> Call:
    """A contestant that is built at its first call, and runs without gradients."""
    built = cache(build)

    def call(pixels: Tensor) -> Any:
        with torch.no_grad():
            return built()(pixels)

    return call


def _tokens(output: Any, prefix: int) -> Tensor:
    """Class token and patch tokens on the CPU, [B, 1 + P, C], from the output of any library."""
    if isinstance(output, Mapping) and "x_norm_patchtokens" in output:  # Meta's names
        found = torch.cat((output["x_norm_clstoken"][:, None], output["x_norm_patchtokens"]), dim=1)
    elif isinstance(output, Mapping) and "patch_tokens" in output:  # an engine's names
        found = torch.cat((torch.as_tensor(output["cls_token"])[:, None], torch.as_tensor(output["patch_tokens"])), 1)
    elif hasattr(output, "patch_tokens"):
        found = torch.cat((output.cls_token[:, None], output.patch_tokens), dim=1)
    else:
        every = getattr(output, "last_hidden_state", output)
        found = torch.cat((every[:, :1], every[:, prefix:]), dim=1)
    return found.float().cpu()


# --- modules of torch ----------------------------------------------------------------------------------------------


def _ways(
    setup: Setup, library: str, kind: str, module: Callable[[], Any], compiles: bool = True
) -> Iterator[Contestant]:
    """A module in float32, cast to bfloat16, and under autocast; each of them eager and compiled.

    `module` builds it in float32; the module is called with pixels [B, 3, H_px, W_px].
    """
    once = cache(module)
    for precision, way in WAYS:
        for mode in (None, *(COMPILE[setup.device.type] if setup.compile and compiles else ())):
            setting = ", ".join(part for part in (kind, way, mode and f"compiled {mode}") if part)
            yield Contestant(library, setting, precision, partial(_prepared, once, way, mode, setup.device))


def _prepared(module: Callable[[], Any], way: str, mode: str | None, device: torch.device) -> Call:
    model = module()
    dtype = torch.bfloat16 if way == "cast" else torch.float32
    if way == "cast":
        model = copy.deepcopy(model).to(dtype)
    if mode is not None:  # by default torch stops compiling a function after 8 variants, without an error
        importlib.import_module("torch._dynamo").config.recompile_limit = 64
    run = model if mode is None else torch.compile(model, dynamic=False, mode=mode)
    freeze = device.type == "cpu" and mode == "max-autotune"  # else each call packs the weights again

    def call(pixels: Tensor) -> Any:
        arithmetic = torch.autocast(device.type, torch.bfloat16) if way == "autocast" else nullcontext()
        freezing: Any = nullcontext()
        if freeze:
            from torch._inductor import config

            freezing = config.patch(freezing=True)
        with arithmetic, freezing, nullcontext() if mode is None else quiet("torch"):  # tuning prints tables
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            return run(pixels.to(dtype))

    return call


def _ours(setup: Setup) -> Iterator[Contestant]:
    """The plain module, and on a CPU also `extract_features` in each mode."""
    for precision, mode in MODES.items() if setup.device.type == "cpu" else ():
        yield Contestant("ours", f"extract_features {mode}", precision, partial(_extracting, setup, mode))
    yield from _ways(setup, "ours", "module", lambda: setup.model)


def _extracting(setup: Setup, mode: Any) -> Call:
    """`extract_features` with mean 0 and std 1, so that all contestants get the same pixels."""
    model = Backbone.from_pretrained(setup.written("hf"), device=setup.device, dtype="float32", mode=mode)
    model.preprocess = replace(model.preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    handler = _Refusal(logging.WARNING)
    logging.getLogger("dinov3_infer").addHandler(handler)
    try:
        model.extract_features(torch.rand(3, *setup.size), size=setup.size, fit="squash")
    finally:
        logging.getLogger("dinov3_infer").removeHandler(handler)
    return partial(model.extract_features, size=setup.size, fit="squash")


class _Refusal(logging.Handler):
    """Raises if a mode is replaced by another one, so that no time is recorded under a wrong name."""

    def emit(self, record: logging.LogRecord) -> None:
        raise UnsupportedError(record.getMessage())


def _transformers(setup: Setup) -> Iterator[Contestant]:
    if find_spec("transformers") is None:
        return

    def load(attention: str | None) -> Any:
        mend_torchvision()
        import transformers

        with quiet("transformers"):  # it warns about a missing pooler
            model = transformers.AutoModel.from_pretrained(
                setup.written("hf"), attn_implementation=attention, dtype=torch.float32
            )
        extra = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
        return _Called(model.to(setup.device).eval(), extra)

    if not isinstance(setup.model, ViTBackbone):
        yield from _ways(setup, "transformers", "", partial(load, None))
        return
    yield from _ways(setup, "transformers", "sdpa", partial(load, "sdpa"))
    yield from _ways(setup, "transformers", "eager", partial(load, "eager"), compiles=False)


class _Called(nn.Module):
    """A module that is called with fixed options."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels, **self.options)


def timm_model(written: Path, device: torch.device, size: tuple[int, int] | None = None) -> Any:
    """timm's model with the weights of a folder in its layout; called with pixels it gives all tokens."""
    mend_torchvision()
    timm: Any = importlib.import_module("timm")
    architecture = json.loads((written / "config.json").read_text())["architecture"]
    stages = architecture.startswith("convnext")
    options: dict[str, Any] = {} if size is None or stages else dict(img_size=size)
    model: Any = timm.create_model(architecture, num_classes=0, **options)
    state = load_file(written / "model.safetensors")
    if size is not None and "pos_embed" in state:  # resized once, and not in every call
        state["pos_embed"] = timm.layers.resample_abs_pos_embed(
            state["pos_embed"], list(model.patch_embed.grid_size), num_prefix_tokens=0 if model.no_embed_class else 1
        )
    model.load_state_dict(state, strict=True)
    model.forward = partial(_timm_tokens, model) if stages else model.forward_features
    return model.to(device).eval()


def _timm_tokens(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Class token and patch tokens of timm's ConvNeXt, which normalises only the class token."""
    last = model.forward_features(pixels)
    patches = model.head.norm(last).flatten(2).mT
    return {"cls_token": model.forward_head(last, pre_logits=True), "patch_tokens": patches}


def _timm(setup: Setup) -> Iterator[Contestant]:
    if find_spec("timm") is not None:
        yield from _ways(setup, "timm", "", lambda: timm_model(setup.written("timm"), setup.device, setup.size))


def _reference(setup: Setup) -> Iterator[Contestant]:
    """Meta's code, from the checkout of the user."""
    if setup.reference is None:
        return
    info = setup.model.info
    if info is None or not (setup.reference / "hubconf.py").is_file():
        raise InputError(
            f"--reference needs a checkout of Meta's code with a hubconf.py, and a model that this code has; got "
            f"'{setup.reference}' and {info.name if info else 'a model without a name'}"
        )

    def load() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about optional packages
            model = torch.hub.load(str(setup.reference), info.architecture, source="local", pretrained=False)
        model.load_state_dict(torch.load(setup.written("meta"), map_location="cpu", weights_only=True), strict=True)
        model.forward = model.forward_features
        return model.to(setup.device).eval()

    yield from _ways(setup, "reference", "", load)
