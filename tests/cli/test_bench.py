"""`bench`: the contestants, the check of their results, and the table."""

import json
import logging
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import Ran, refused, run, small_model

from dinov3_infer import Backbone
from dinov3_infer.cli.bench import contest, contestants as module, repairs, report as bench
from dinov3_infer.cli.bench.contest import ratios, spread

# Stands for a checkout of the reference: an entry with Meta's names and Meta's outputs.
HUBCONF = """
from torch import nn
from dinov3_infer.torchhub import HubBackbone

class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = HubBackbone.from_config("nano")

    def load_state_dict(self, state, strict):
        import tempfile, torch
        assert strict and "storage_tokens" in state
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            torch.save(state, file.name)
            LOAD

    def forward_features(self, pixels):
        return self.model.forward_features(pixels)

def nano(pretrained):
    assert pretrained is False
    return Reference()
"""
LOAD = 'self.model = HubBackbone.from_pretrained("nano", weights=file.name, device="cpu")'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LEAST_MS", 0.0)


def measured(folder: Path, *argv: object) -> tuple[Ran, dict[str, Any]]:
    out = folder / "record.json"
    ran = run("bench", "--size", "32", "--rounds", "2", "--threads", "1", "--json", out, *argv)
    assert ran.status == 0, ran.err
    return ran, json.loads(out.read_text())


def settings(record: dict[str, Any], library: str) -> dict[tuple[str, str], dict[str, Any]]:
    entries = record["contestants"].values()
    return {(e["setting"], e["precision"]): e for e in entries if e["library"] == library}


def test_ours_and_transformers(tmp_path: Path) -> None:
    """Without weights the model is random; every contestant is right and is timed in every round."""
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    ran, record = measured(tmp_path, "dinov3_vits16", "--batch", "2")  # gated: no machine of tests has its weights
    assert torch.get_num_threads() == threads
    assert (record["weights"], record["threads"], record["cell"]) == ("random", 1, {"pixels": [32, 32], "batch": 2})
    theirs = settings(record, "transformers")
    ways = {("", "float32"), ("cast", "bfloat16"), ("autocast", "bfloat16")}
    assert set(theirs) == {(", ".join(filter(None, (kind, way))), p) for kind in ("sdpa", "eager") for way, p in ways}
    ours = settings(record, "ours")
    assert {("extract_features exact", "float32"), ("extract_features fast", "bfloat16")} < set(ours)
    for (_, precision), entry in (theirs | {k: e for k, e in ours.items() if "module" in k[0]}).items():
        assert len(entry["rounds_ms"]) == 2, entry
        assert entry["error"] <= module.LIMITS[precision]
        assert precision == "float32" or entry["error"] > 1e-7  # it is another arithmetic indeed
    lines = ran.out.splitlines()
    assert lines[0] == "dinov3_vits16, weights random (speed does not depend on them), 32x32 pixels, batch 2"
    for precision in ("float32", "bfloat16"):
        start = next(i for i, line in enumerate(lines) if line.startswith(precision))
        speeds = []
        for line in lines[start + 1 :]:
            if not (found := re.fullmatch(r"  (\S.*?)  +([\d.]+) +[\d.]+ ±[\d.]+ +[\d.]+ ±[\d.]+ +[\d.]+", line)):
                break
            speeds.append(float(found[2]))
        assert len(speeds) >= 3 and speeds == sorted(speeds, reverse=True)
        assert re.search("transformers at its best takes .* times as long as ours", ran.out)
    assert "torch.compile was not measured" in ran.err


def test_one_class_of_arithmetic(tmp_path: Path) -> None:
    _, record = measured(tmp_path, small_model(), "--dtype", "float32")
    assert {entry["precision"] for entry in record["contestants"].values()} == {"float32"}
    assert record["weights"] == "as given"


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_reference_comes_from_a_checkout(wrong: bool, tmp_path: Path) -> None:
    """A contestant with a wrong result is listed with its error, and not timed."""
    (tmp_path / "hubconf.py").write_text(HUBCONF.replace("LOAD", "pass" if wrong else LOAD))
    ran, record = measured(tmp_path, "nano", "--dtype", "float32", "--reference", tmp_path)
    (entry,) = settings(record, "reference").values()
    assert ("rounds_ms" in entry) is not wrong and (entry["error"] > 1e-3) is wrong
    assert bool(re.search("not timed\n.*reference, float32: wrong: error", ran.out, re.DOTALL)) is wrong


def test_a_mode_that_gives_way_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that replaces it has a separate row."""

    def warn(self: Any, *_: Any, **__: Any) -> None:
        if self.mode == "int8":
            logging.getLogger("dinov3_infer").warning("mode='int8' is not available here: far off; using mode='fast'")

    extract = Backbone.extract_features
    monkeypatch.setattr(Backbone, "extract_features", lambda self, *a, **k: warn(self) or extract(self, *a, **k))
    _, record = measured(tmp_path, "nano")
    entry = settings(record, "ours")["extract_features int8", "int8"]
    assert entry["refused"].startswith("UnsupportedError: mode='int8' is not available") and "rounds_ms" not in entry


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    refused(1, "unknown model 'vitx'", "bench", "vitx")
    refused(1, "not a multiple of the patch size 16", "bench", "nano", "--size", "33")
    refused(1, "a checkout of Meta's code with a hubconf.py", "bench", "nano", "--size", "32", "--reference", tmp_path)
    refused(1, r"should end in \.json", "bench", "nano", "--json", tmp_path / "x.txt")
    refused(2, "did you mean 'int8'", "bench", "nano", "--dtype", "int4")


def test_ratios_are_of_each_round() -> None:
    """The median of the ratios differs from the ratio of the medians."""
    assert ratios([3.0, 2.0, 8.0], [1.0, 2.0, 4.0]) == [3.0, 1.0, 2.0]
    assert spread([3.0, 1.0, 2.0]) == 0.5 and spread([3.0]) == 0.0


@pytest.mark.peers
@pytest.mark.parametrize("model", ["dinov3_vits16", "dinov2_vits14_reg", "dinov2_vits14", "dino_vits16"])
def test_every_library_that_is_installed(model: str, tmp_path: Path) -> None:
    """All of them take part for all families, and are right."""
    ran, record = measured(tmp_path, model, "--size", "112")
    libraries = {"transformers", "timm"}
    libraries |= {name for name in ("onnxruntime", "openvino") if record["environment"][name]}
    for library in libraries:
        for way, entry in settings(record, library).items():
            assert "rounds_ms" in entry, (library, way, entry["refused"])


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    """Compiled contestants take part on request, and differ from eager ones."""
    pytest.importorskip("transformers")
    _, record = measured(tmp_path, "nano", "--compile", "--dtype", "float32")
    for library, kind in (("ours", "module"), ("transformers", "sdpa")):
        for mode in module.COMPILE["cpu"]:
            entry = settings(record, library)[f"{kind}, compiled {mode}", "float32"]
            assert "rounds_ms" in entry, entry


@pytest.mark.slow
def test_no_compiled_contestant_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch would stop compiling at the eighth variant of a class."""
    compiled, compile_ = [], torch.compile

    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic, mode: compile_(model, dynamic=dynamic, backend=partial(backend))
    )
    for _ in range(10):
        module._prepared(Doubling, "", "default", torch.device("cpu"))(torch.ones(2))
    assert len(compiled) == 10


def test_a_torchvision_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its missing operators are defined; a working one is left unchanged."""
    made: list[str] = []

    class Library:
        def __init__(self, *_: str) -> None:
            pass

        def define(self, schema: str) -> None:
            made.append(schema.split("(")[0])

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(repairs, "_KEPT", [])
    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(repairs.importlib, "import_module", broken)
    repairs.mend_torchvision()
    assert made == ["nms", "qnms"] and len(repairs._KEPT) == 1
    monkeypatch.setattr(repairs.importlib, "import_module", lambda name: None)
    repairs.mend_torchvision()
    assert len(repairs._KEPT) == 1


def test_of_each_library_the_fastest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest modes take part; the others are listed with their time or the reason of their failure."""
    from benchmarks import cpu

    takes = {"quick": 0.02, "nearly": 0.021, "slow": 0.06, "other": 0.1, "broken": 0.0}
    precisions: dict[str, Any] = dict.fromkeys(takes, "float32") | {"other": "bfloat16"}
    ran = []

    def call(name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "broken":
            raise NotImplementedError("no such engine")
        time.sleep(takes[name])
        ran.append(name)
        return x

    monkeypatch.setattr(cpu, "NEARLY", 1.8)
    taking_part = [module.Contestant("lib", name, precisions[name], lambda: torch.relu) for name in takes]
    calls = {one.label: partial(call, one.setting) for one in taking_part}
    cell = contest.Cell({}, [torch.ones(1)], calls, lambda out: 0.0, 1.0)
    goes_on, took = cpu.trial(cell, taking_part, contest.Settings(torch.device("cpu")))
    assert goes_on == ["lib, quick, float32", "lib, nearly, float32", "lib, other, bfloat16"]
    assert took["lib, broken, float32"] == "NotImplementedError: no such engine"
    assert sorted(ran) == sorted(2 * [name for name in takes if name != "broken"])
    slow = took["lib, slow, float32"]
    assert isinstance(slow, float) and slow >= 60.0


BROKEN = """
import ctypes, os, signal, struct, sys
from dinov3_infer.cli.bench.repairs import mend_signal_stack
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
ctypes.CDLL(None).sigaltstack(struct.pack("@Pi4xN", 4096, 0, 65536), None)  # where nothing is
if sys.argv[1] == "mend":
    mend_signal_stack()
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("what, code, said", [("mend", 0, "handled\n"), ("leave", -11, "")])
def test_a_signal_after_openvino(what: str, code: int, said: str) -> None:
    """Signal handlers do not run on a freed stack, which would kill the process."""
    done = subprocess.run([sys.executable, "-c", BROKEN, what], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, said)
