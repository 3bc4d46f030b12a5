"""`doctor`: its report of the installation is right, and contains no secret."""

import os
import re
import subprocess
import sys

import pytest
import torch
from cli_runs import run, verdict
from hub_server import READER, SECRET, STRANGER, Hub
from repository import ROOT

from dinov3_infer import Backbone
from dinov3_infer.cli import doctor as doctor_command, golden
from dinov3_infer.zoo import MODELS


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ran = run("doctor")
    assert (ran.status, ran.err) == (0, "")
    assert SECRET not in ran.out
    for words in (
        rf"versions +dinov3_infer .* in {re.escape(str(ROOT / 'dinov3_infer'))}",
        rf"versions +torch {re.escape(torch.__version__)}, ",
        r"devices .* cores, \d+ torch threads",
        r"attention +(the Triton kernel|torch's SDPA; the Triton kernel is not used: )",
        r"CPU plan +exact (works|is not .*), fast (works|is not .*), int8 (works|is not .*)",
        r"CPU plan +attention and norms (are compiled C|run in torch: .*)",
        r"cache .* GiB free",
        r"cache +cached models: ",
        r"hub +https?://\S+, a token is stored",
        r"hub +not asked \(HF_HUB_OFFLINE=1\)",
        r"environment .*HF_HUB_OFFLINE=1.*OMP_NUM_THREADS=1",
        r"forward +three images on cpu in \d+ ms; the features differ by \S+ from the recorded ones",
    ):
        assert re.search(words, ran.out), words
    assert verdict(ran) == "works"


def test_doctor_says_what_of_a_model_is_taken_from_where() -> None:
    ran = run("doctor", "nano")
    assert ran.status == 0
    for words in (
        "nano: 4 blocks",
        "num_heads: 3, from config.json",
        "licence: Apache-2.0, from",
        "transform: squash 256",
    ):
        assert re.search(rf"model +{re.escape(words)}", ran.out), words
    assert run("doctor", "absent.pth").status == 1


def test_doctor_goes_on_after_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_command, "difference", lambda *_: 0.3)
    monkeypatch.setattr(doctor_command.shutil, "disk_usage", lambda _: 1 / 0)
    ran = run("doctor")
    assert ran.status == 1 and verdict(ran) == "2 of 8 checks failed"
    assert "cache         FAILED: ZeroDivisionError" in ran.out
    assert (
        "forward       FAILED: RuntimeError('on cpu the features differ by 3.0e-01 from the recorded ones')" in ran.out
    )
    monkeypatch.setattr(doctor_command, "by_formula", lambda: Backbone.from_config(golden.by_formula().config, seed=0))
    assert "the weights made by a formula differ from the recorded ones" in run("doctor").out


def test_doctor_asks_the_hub() -> None:
    """It reports whether the stored token opens the gated repository, without printing the token."""
    hub = Hub()
    hub.add(str(MODELS["dinov3_vits16"].hub_id), {"config.json": b"{}"}, gated=True)
    script = """
import os, sys
from dinov3_infer.cli.doctor import _hub
for token in ("", *sys.argv[1:]):
    os.environ["HF_TOKEN"] = token
    print(*_hub(), sep=" | ")
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, STRANGER, READER], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0 and SECRET not in done.stdout + done.stderr, done.stderr
    without, stranger, reader = done.stdout.splitlines()
    assert (
        without.startswith(f"{hub.url}, no token is stored | access to 'facebook/") and "no token was sent" in without
    )
    assert ", a token is stored | access to" in stranger and "the token that was sent has no access" in stranger
    assert reader.endswith("| 'facebook/dinov3-vits16-pretrain-lvd1689m' can be downloaded")
