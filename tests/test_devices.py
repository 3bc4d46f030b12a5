"""Devices by name: a missing device is an error, and an Apple GPU is tested before use."""

import logging
from typing import Any

import pytest
import torch
from cli_runs import run
from pictures import complaint

from dinov3_infer import Backbone, InputError, backbone as backbone_module, devices, recorded
from dinov3_infer.devices import find_device, find_dtype


@pytest.mark.parametrize(
    "device, said",
    [
        ("tpu9", "device is 'auto' or a torch device such as 'cpu' or 'cuda:1'; got 'tpu9'"), (3.5, "got 3.5"),
        ("mps", "this torch sees no Apple GPU"), ("xpu", "this torch sees no device of type xpu"),
        ("hpu:1", "sees no device of type hpu"), ("vulkan", "sees no device of type vulkan"),
        ("cuda", "this torch sees no CUDA"), (torch.device("cuda:9"), "'cuda:9' is not available"), ("", "got ''"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_a_sentence(device: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "mps_available", lambda: False)
    assert said in complaint(InputError, lambda: Backbone.from_pretrained("nano", device=device))


def test_the_number_of_a_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1", lambda: None) == (torch.device("cuda:1"), None)
    assert "there are 2, numbered from 0" in complaint(InputError, lambda: find_device("cuda:2", lambda: None))


@pytest.mark.parametrize(
    "cuda, mps, reason, asked, found",
    [
        (True, True, None, "auto", "cuda"), (False, True, None, "auto", "mps"), (False, False, None, "auto", "cpu"),
        (False, True, "differs", "auto", "cpu"), (False, True, "differs", "mps", "cpu"),
        (False, True, None, "mps", "mps"),
        (True, True, "differs", "auto", "cuda"), (False, True, None, "cpu", "cpu"), (True, True, None, "mps", "mps"),
    ],
)  # fmt: skip
def test_auto_is_cuda_then_mps_then_cpu(
    cuda: bool, mps: bool, reason: str | None, asked: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(devices, "mps_available", lambda: mps)
    tried = []
    device, said = find_device(asked, lambda: tried.append(1) or reason)  # type: ignore[func-returns-value]
    assert (device.type, said) == (
        found,
        reason if "mps" in (found, asked) or (mps and not cuda) else None,
    ) or asked == "cpu"
    assert bool(tried) == (asked == "mps" or (asked == "auto" and mps and not cuda))


class Stand:
    """A Backbone on a device that computes as told."""

    def __init__(self, answer: Any) -> None:
        self.bb, self.answer = Backbone.from_pretrained("nano", device="cpu"), answer

    def fingerprint(self) -> str:
        return self.bb.fingerprint()

    def to(self, device: torch.device) -> Any:
        assert device.type == "mps"
        if isinstance(self.answer, Exception):
            raise self.answer
        with torch.no_grad():
            self.bb.norm.weight *= self.answer
        return self.bb


@pytest.mark.parametrize(
    "answer, said",
    [
        (1.0, None), (1.00005, None), (1.01, "its features are "),
        (float("nan"), "PrecisionError in a trial: the features are not finite"),
        (RuntimeError("MPS backend out of memory\nmore"), "RuntimeError in a trial: MPS backend out of memory"),
        (NotImplementedError("aten::x"), "NotImplementedError in a trial"),
        (TypeError("Cannot convert a MPS Tensor to float64"), "TypeError in a trial: Cannot convert"),
    ],
)  # fmt: skip
def test_the_trial_of_a_device(answer: Any, said: str | None) -> None:
    reason = recorded.why_not(Stand(answer), torch.device("mps"))
    assert reason is None if said is None else reason is not None and reason.startswith(said)


def test_the_cpu_is_taken_where_the_trial_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One log line and one trial per process; `doctor` reports the reason."""
    trials = []

    def trial(bb: Any, device: torch.device) -> str:
        trials.append(device)
        return "its features are 3.0e-01 away from the recorded ones"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "mps_available", lambda: True)
    monkeypatch.setattr("dinov3_infer.cli.doctor.mps_available", lambda: True)
    monkeypatch.setattr(recorded, "why_not", trial)
    backbone_module.why_not_mps.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "dinov3_infer"):
            assert Backbone.from_pretrained("nano").device.type == "cpu"
        assert [r.getMessage() for r in caplog.records] == [
            "using the CPU in place of the Apple GPU: its features are 3.0e-01 away from the recorded ones"
        ]
        assert Backbone.from_pretrained("nano", device="mps").device.type == "cpu" and trials == [torch.device("mps")]
        assert "mps is not used: its features are 3.0e-01 away" in run("doctor").out
        monkeypatch.setattr(recorded, "why_not", lambda *_: None)
        backbone_module.why_not_mps.cache_clear()
        assert "mps: Apple GPU, features equal the recorded ones" in run("doctor").out
    finally:
        backbone_module.why_not_mps.cache_clear()


def test_dtypes_by_name() -> None:
    assert find_dtype("auto") is None and find_dtype("torch.bfloat16") == find_dtype("bfloat16") == torch.bfloat16
    for wrong in ("int8", "fp16", torch.int8, None, "bf 16"):
        assert "dtype is 'auto', float32" in complaint(InputError, lambda w=wrong: find_dtype(w))  # type: ignore[misc]
