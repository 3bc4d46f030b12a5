"""Settings of the whole suite."""

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # The workers share the cores; torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

for _number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
    # Jobs in the background and under nohup ignore these, and the processes that tests start would inherit that.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

if importlib.util.find_spec("torchvision") is not None and not torch.cuda.is_available():
    # torchvision's CUDA wheel beside a CPU build of torch: its own library does not load, so it misses two schemas.
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="run models in the mode plain, without the fast path")


@pytest.fixture(autouse=True)
def _plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("--plain") and not request.node.get_closest_marker("planned"):
        monkeypatch.setattr("dinov3_infer.features.extractor.plan_of", lambda *_: None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    yield
    if "openvino" in sys.modules:
        from dinov3_infer.cli.bench.repairs import mend_signal_stack

        mend_signal_stack()


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def saved(request: pytest.FixtureRequest, make_saved: Callable[[str], Any]) -> Any:
    """The model of the name that a test asks for, made and saved by the `make_saved` of its own module."""
    return make_saved(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {
        "gpu": None if torch.cuda.is_available() else "needs CUDA",
        "peers": None if importlib.util.find_spec("timm") else "needs timm (see the README's section on tests)",
    }
    for item in items:
        for marker, reason in skips.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
