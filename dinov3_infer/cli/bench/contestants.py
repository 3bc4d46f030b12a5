"""Who takes part in `dinov3-infer bench`: whatever is installed, in each of the ways in which it can be run.

All have the weights of one model of ours and are given the same pixels.  A library is imported when its first
contestant is called; one that cannot be built or run is refused with the reason, and the others go on.
"""

import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ...backbone import Backbone
from ...errors import InputError, UnsupportedError
from .contest import Cell, mend_signal_stack, mend_torchvision

__all__ = ["Contestant", "Precision", "Setup", "cell_of", "contestants", "timm_model"]

Precision = Literal["float32", "bfloat16", "int8"]
Call = Callable[[Tensor], Any]

# 1 - cosine of the worst token, in each class of arithmetic; what computes something else is far beyond
LIMITS: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 3e-2, "int8": 2e-1}
OTHER_RULE = 5e-2  # of float32 where positions are resized: everyone has a rule of their own for that
MODES: dict[Precision, str] = {"float32": "exact", "bfloat16": "fast", "int8": "int8"}  # of ours on a CPU
WAYS: tuple[tuple[Precision, str], ...] = (("float32", ""), ("bfloat16", "cast"), ("bfloat16", "autocast"))
# reduce-overhead is about CUDA graphs, and on a CPU the same as default
COMPILE = {"cpu": ("default", "max-autotune"), "cuda": ("default", "reduce-overhead", "max-autotune")}


@dataclass(frozen=True)
class Contestant:
    """One way to compute the tokens."""

    library: str
    setting: str  # of that library
    precision: Precision  # the class it competes in
    build: Callable[[], Call] = field(compare=False)  # gives what is timed: pixels [B, 3, H_px, W_px] to tokens

    @property
    def label(self) -> str:
        return ", ".join(part for part in (self.library, self.setting, self.precision) if part)


@dataclass
class Setup:
    """What all have in common."""

    model: Backbone  # float32, on the device
    size: tuple[int, int]
    batch: int
    folder: Path  # for files of the model; as large as the weights, several times
    threads: int
    precisions: tuple[Precision, ...] = get_args(Precision)
    compile: bool = False  # minutes
    reference: Path | None = None  # a checkout of Meta's code

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def resized(self) -> bool:
        """Whether learned positions are needed for another grid than their own."""
        side, patch = self.model.config.position_grid, self.model.patch_size
        return side is not None and (side * patch, side * patch) != self.size

    def written(self, layout: Literal["hf", "meta", "timm"]) -> Path:
        """The weights in the layout of a library."""
        path = self.folder / (layout + (".pth" if layout == "meta" else ""))
        if not path.exists():
            with _quiet("dinov3_infer"):  # it tells what a layout has no place for, which nothing here needs
                self.model.save_pretrained(path, layout)
        return path

    def onnx(self) -> Path:
        """The model as a file for engines; `Backbone.export` has checked it."""
        path = self.folder / "model.onnx"
        return path if path.exists() else self.model.export(path, size=self.size)


def contestants(setup: Setup) -> list[Contestant]:
    """Those of all libraries that are installed, ours first."""
    found = [*_ours(setup), *_transformers(setup), *_timm(setup), *_reference(setup)]
    if setup.device.type == "cpu":
        found += [*_onnxruntime(setup), *_openvino(setup)]
    return [one for one in found if one.precision in setup.precisions]


def cell_of(setup: Setup, taking_part: list[Contestant]) -> Cell:
    """The contest.  The error of a contestant is 1 - cosine of its worst class or patch token."""
    pixels = torch.rand(setup.batch, 3, *setup.size, generator=torch.Generator().manual_seed(0)).to(setup.device)
    prefix = setup.model.config.num_prefix
    judge = copy.deepcopy(setup.model)
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
    return Cell(what, [pixels], {one.label: _lazy(one.build) for one in taking_part}, error, limits, replay=False)


def _lazy(build: Callable[[], Call]) -> Call:
    """Built at its first call, without gradients at all of them."""
    built = cache(build)

    def call(pixels: Tensor) -> Any:
        with torch.no_grad():
            return built()(pixels)

    return call


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings of this library, and no bars; what goes wrong is raised."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _tokens(output: Any, prefix: int) -> Tensor:
    """Class token and patches on the CPU, [B, 1 + P, C], from whatever a library returns."""
    if isinstance(output, Mapping) and "x_norm_patchtokens" in output:  # Meta's names
        found = torch.cat((output["x_norm_clstoken"][:, None], output["x_norm_patchtokens"]), dim=1)
    elif isinstance(output, Mapping) and "patch_tokens" in output:  # of an engine
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
    """A module in float32, cast to bfloat16 and under autocast, each as it is and compiled.

    `module` makes it in float32; it is called with pixels.
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
    if mode is not None:  # torch compiles a function 8 times and then runs it as it is, without an error
        importlib.import_module("torch._dynamo").config.recompile_limit = 64
    run = model if mode is None else torch.compile(model, dynamic=False, mode=mode)
    freeze = device.type == "cpu" and mode == "max-autotune"  # or weights are packed anew in every call

    def call(pixels: Tensor) -> Any:
        arithmetic = torch.autocast(device.type, torch.bfloat16) if way == "autocast" else nullcontext()
        freezing: Any = nullcontext()
        if freeze:
            from torch._inductor import config

            freezing = config.patch(freezing=True)
        with arithmetic, freezing, nullcontext() if mode is None else _quiet("torch"):  # tuning prints tables
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            return run(pixels.to(dtype))

    return call


def _ours(setup: Setup) -> Iterator[Contestant]:
    """The plain module, and on a CPU as users call it, from the picture on, in each mode."""
    for precision, mode in MODES.items() if setup.device.type == "cpu" else ():
        yield Contestant("ours", f"extract_features {mode}", precision, partial(_extracting, setup, mode))
    yield from _ways(setup, "ours", "module", lambda: setup.model)


def _extracting(setup: Setup, mode: Any) -> Call:
    """`extract_features`; its normalisation is computed and changes nothing, so that all are given the same pixels."""
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
    """A mode that gives way to another one is not timed as what it is not."""

    def emit(self, record: logging.LogRecord) -> None:
        raise UnsupportedError(record.getMessage())


def _transformers(setup: Setup) -> Iterator[Contestant]:
    if find_spec("transformers") is None:
        return

    def load(attention: str) -> Any:
        mend_torchvision()
        import transformers

        with _quiet("transformers"):  # it speaks of a pooler that nobody asked for
            model = transformers.AutoModel.from_pretrained(
                setup.written("hf"), attn_implementation=attention, dtype=torch.float32
            )
        extra = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
        return _Called(model.to(setup.device).eval(), extra)

    yield from _ways(setup, "transformers", "sdpa", partial(load, "sdpa"))
    yield from _ways(setup, "transformers", "eager", partial(load, "eager"), compiles=False)


class _Called(nn.Module):
    """A module with options of its call."""

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
    options: dict[str, Any] = {} if size is None else dict(img_size=size)
    model: Any = timm.create_model(architecture, num_classes=0, **options)
    state = load_file(written / "model.safetensors")
    if size is not None and "pos_embed" in state:  # resized once, and not in every call
        state["pos_embed"] = timm.layers.resample_abs_pos_embed(
            state["pos_embed"], list(model.patch_embed.grid_size), num_prefix_tokens=0 if model.no_embed_class else 1
        )
    model.load_state_dict(state, strict=True)
    model.forward = model.forward_features
    return model.to(device).eval()


def _timm(setup: Setup) -> Iterator[Contestant]:
    if find_spec("timm") is not None:
        yield from _ways(setup, "timm", "", lambda: timm_model(setup.written("timm"), setup.device, setup.size))


def _reference(setup: Setup) -> Iterator[Contestant]:
    """Meta's own code, from the checkout of whoever asks."""
    if setup.reference is None:
        return
    info = setup.model.info
    if info is None or not (setup.reference / "hubconf.py").is_file():
        raise InputError(
            f"--reference is the folder of a checkout with a hubconf.py, and goes with a model that it knows; got "
            f"'{setup.reference}' and {info.name if info else 'an architecture of its own'}"
        )

    def load() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it would like to have installed
            model = torch.hub.load(str(setup.reference), info.architecture, source="local", pretrained=False)
        model.load_state_dict(torch.load(setup.written("meta"), map_location="cpu", weights_only=True), strict=True)
        model.forward = model.forward_features
        return model.to(setup.device).eval()

    yield from _ways(setup, "reference", "", load)


# --- engines -------------------------------------------------------------------------------------------------------


def _onnxruntime(setup: Setup) -> Iterator[Contestant]:
    def load() -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setup.threads
        session = onnxruntime.InferenceSession(setup.onnx(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda pixels: dict(zip(names, session.run(names, {"pixel_values": pixels.numpy()}), strict=True))

    if find_spec("onnxruntime") is not None:
        yield Contestant("onnxruntime", "all optimisations", "float32", load)


class _Compiled:
    """A model of OpenVINO, which does not go without leaving something behind."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, pixels: Tensor) -> Any:
        return {output.get_any_name(): tokens for output, tokens in self.model(pixels.numpy()).items()}

    def __del__(self) -> None:
        del self.model
        mend_signal_stack()


def _openvino(setup: Setup) -> Iterator[Contestant]:
    def load(precision: str, quantised: bool = False) -> Call:
        import openvino

        model = openvino.convert_model(setup.onnx())
        model.reshape([setup.batch, 3, *setup.size])
        if quantised:
            import nncf

            noise = torch.rand(16, setup.batch, 3, *setup.size, generator=torch.Generator().manual_seed(1))
            data = nncf.Dataset([pixels.numpy() for pixels in noise])
            with _quiet("nncf"):
                model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=16)
        hints = dict(
            PERFORMANCE_HINT="LATENCY", INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=setup.threads
        )
        return _Compiled(openvino.Core().compile_model(model, "CPU", hints))

    if find_spec("openvino") is not None:
        yield Contestant("openvino", "f32", "float32", partial(load, "f32"))
        yield Contestant("openvino", "bf16", "bfloat16", partial(load, "bf16"))
        if find_spec("nncf") is not None:
            yield Contestant("openvino", "int8 by nncf", "int8", partial(load, "bf16", True))
