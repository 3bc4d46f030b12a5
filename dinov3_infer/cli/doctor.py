"""`dinov3-infer doctor`: reports the installation and the devices, and checks that the results are right."""

import argparse
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __file__ as package_file
from ..backbone import Backbone, why_not_mps
from ..checkpoints.reading import CONFIG
from ..devices import mps_available
from ..errors import Dinov3Error
from ..hub.answers import HubOptions, explain
from ..model.attention import why_not_triton
from ..model.cpu.compiled import why_not_compiled
from ..model.cpu.linear import why_not_int8, why_not_packed
from ..recorded import compute, difference, known
from ..version import __version__
from ..web import client_error, queries_cut, reach, reason, without_query
from ..zoo import MODELS
from .golden import FORMULA, by_formula
from .main import FAILED, OK, say
from .models import cached

__all__ = ["cpu_name", "run", "version_of"]

_REQUIRED = ("torch", "numpy", "pillow", "safetensors", "huggingface-hub", "tqdm")
_OPTIONAL = (
    "triton", "dinov3-infer", "transformers", "timm", "peft", "torchvision", "kernels", "onnxruntime", "openvino",
)  # fmt: skip
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE",
    "MKL_NUM_THREADS", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_HOME", "TRITON_INTERPRET",
)  # fmt: skip
CLOSE = {"cpu": 2e-5, "cuda": 2e-2}  # largest relative distance from the recorded vectors
_GATED = "dinov3_vits16"


def run(args: argparse.Namespace) -> int:
    """Runs all checks and prints their results; returns 1 if one of them failed."""
    faults = 0
    checks = [*_CHECKS, *([("model", lambda: _model(args.model))] if args.model else [])]
    for title, check in checks:
        try:
            for line in check():
                say(f"{title:<13} {line}")
        except Exception as error:  # a failed check must not hide the others
            faults += 1
            say(f"{title:<13} FAILED: {error if isinstance(error, Dinov3Error) else repr(error)}")
    say(f"{'verdict':<13} {f'{faults} of {len(checks)} checks failed' if faults else 'works'}")
    return FAILED if faults else OK


def _versions() -> Iterator[str]:
    yield f"dinov3_infer {__version__} in {Path(package_file).parent}"
    yield f"python {platform.python_version()} on {platform.platform()}"
    found = {name: version_of(name) for name in (*_REQUIRED, *_OPTIONAL)}
    found["torch"] = torch.__version__  # ends in "+cpu" or "+cu130"
    yield ", ".join(f"{name} {number or 'MISSING'}" for name, number in found.items() if number or name in _REQUIRED)


def version_of(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    yield f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if mps_available():
        reason = why_not_mps()
        yield "mps: Apple GPU, features equal the recorded ones" if reason is None else f"mps is not used: {reason}"
    elif not torch.cuda.is_available():
        yield f"no GPU; this torch was built with {built}"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}, {built}"


def cpu_name() -> str:
    """The model name of the CPU."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _attention() -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_not_triton(device, torch.bfloat16 if device.type == "cuda" else torch.float32, 64)
    yield "the Triton kernel" if reason is None else f"torch's SDPA; the Triton kernel is not used: {reason}"


def _plan() -> Iterator[str]:
    """Which modes and parts of the fast path for CPUs are available."""
    lacking = {"exact": why_not_packed(), "fast": why_not_packed(torch.bfloat16), "int8": why_not_int8()}
    yield ", ".join(f"{mode} {'works' if reason is None else f'is not available: {reason}'}"
                    for mode, reason in lacking.items())  # fmt: skip
    reason = why_not_compiled()
    yield "attention and norms are compiled C" if reason is None else f"attention and norms run in torch: {reason}"


def _cache() -> Iterator[str]:
    folder = HubOptions().folder
    there = folder
    while not there.exists():
        there = there.parent
    writable = "" if os.access(there, os.W_OK) else ", NOT writable"
    yield f"{folder}, {shutil.disk_usage(there).free / 2**30:.1f} GiB free{writable}"
    yield f"cached models: {', '.join(name for name in MODELS if cached(name)) or 'none'}"


def _hub() -> Iterator[str]:
    from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    options = HubOptions()
    yield f"{without_query(constants.ENDPOINT)}, {'a' if get_token() else 'no'} token is stored"
    repository = str(MODELS[_GATED].hub_id)
    if options.not_asked:
        yield f"not asked ({options.not_asked})"
        return
    link, reached = hf_hub_url(repository, CONFIG), False
    try:
        with queries_cut():
            reach(link)
            reached = True
            get_hf_file_metadata(link)
        yield f"'{repository}' can be downloaded"
    except (OSError, client_error(), EntryNotFoundError) as error:
        yield str(explain(error, repository, options)) if reached else f"cannot be reached ({reason(error)})"


def _environment() -> Iterator[str]:
    shown = (f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ)
    yield " ".join(shown) or "no variable that this package reads is set"


def _model(name: str) -> Iterator[str]:
    """A model, and the source of each of its facts."""
    bb = Backbone.from_pretrained(name, device="cpu")
    yield bb.extra_repr()
    yield from (f"{field}: {text}" for field, text in bb.origin.items())


def _forward() -> Iterator[str]:
    bb = by_formula()
    (record,) = (one for one in known() if one.what == FORMULA)
    if bb.fingerprint() != record.fingerprint:
        raise RuntimeError("the weights made by a formula differ from the recorded ones")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        bb.to(device)
        compute(bb)  # the first call builds the plan
        begun = time.perf_counter()
        distance = difference(compute(bb), record.vectors)
        took = f"{1e3 * (time.perf_counter() - begun):.0f} ms"
        if not distance <= CLOSE[device]:
            raise RuntimeError(f"on {device} the features differ by {distance:.1e} from the recorded ones")
        yield f"three images on {device} in {took}; the features differ by {distance:.1e} from the recorded ones"


_CHECKS: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
    ("versions", _versions), ("devices", _devices), ("attention", _attention), ("CPU plan", _plan), ("cache", _cache),
    ("hub", _hub), ("environment", _environment), ("forward", _forward),
)  # fmt: skip
