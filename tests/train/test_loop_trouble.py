"""Failures in training give the right sentence, lose nothing, and never put a bad number into a checkpoint."""

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint
from PIL import Image
from safetensors.torch import load_file

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.errors import CheckpointError, DiskError, InputError, MissingFileError
from dinov3_infer.train import run_state
from dinov3_infer.train.command import main
from dinov3_infer.train.config import TrainConfig
from dinov3_infer.train.health import TrainingStopped, knn_accuracy, rank_me, spread_of
from dinov3_infer.train.loop import Run, train
from dinov3_infer.train.method import Method

SMALL = dict(
    steps=6, batch_size=4, num_local=0, global_px=32, dino_prototypes=16, ibot_prototypes=16, head_hidden=16,
    head_bottleneck=8, spread_group=2, log_steps=1, workers=0, checkpoint_steps=2, health_steps=2, health_pictures=4,
    freeze_share=0.0, ramp_share=0.0, device="cpu",
)  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        pixels = rng.integers(0, 255, (5, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def start() -> Backbone:
    """A model whose features differ between images."""
    backbone = Backbone.from_config(ViTConfig(24, 2, 2, 48), seed=0)
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)
        elif name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def settings(images: Path, **changes) -> TrainConfig:
    return TrainConfig(**(SMALL | dict(data=(str(images),), out=str(images.parent / "run")) | changes))


def go(config: TrainConfig, resume: bool = False) -> Backbone:
    return train(config, backbone=start(), resume=resume)


def finite(folder: Path) -> bool:
    found = [load_file(path) for path in folder.rglob("*.safetensors")]
    assert found
    return all(bool(tensor.isfinite().all()) for tensors in found for tensor in tensors.values())


def rows(images: Path) -> list[dict]:
    """The records after each step."""
    found = [json.loads(line) for line in (images.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found[0]["step"] == 0 and found[0]["verdict"] == "start"
    return found[1:]


# --- a run that goes wrong ---------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the loss of these steps NaN."""
    plain = Method.forward

    def forward(self, batch, targets, step):
        found = plain(self, batch, targets, step)
        if step in steps:
            found["loss"] = found["loss"] * math.nan
        return found

    monkeypatch.setattr(Method, "forward", forward)


def test_one_infinite_loss_is_left_out(images: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    poison(monkeypatch, {2})
    go(settings(images))
    assert [row["loss"] is not None for row in rows(images)] == [True, True, False, True, True, True]
    assert "skipped step 2" in caplog.text
    assert finite(images.parent / "run")


def test_a_diverged_run_stops_with_the_last_good_weights(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 4, 5})
    said = complaint(TrainingStopped, lambda: go(settings(images)))
    assert "diverged" in said and "lr_at_1024" in said and "weights of step 2" in said
    assert finite(images.parent / "run")
    kept = load_file(images.parent / "run" / "checkpoints" / "00000002" / "tensors.safetensors")
    saved = Backbone.from_pretrained(images.parent / "run" / "backbone", device="cpu")
    assert torch.equal(saved.cls_token, kept["ema.backbone.cls_token"])


def test_a_collapsed_run_stops(images: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Weights that give all images the same features are noticed, reported and not kept."""
    plain = Method.update_ema

    def flat(self, step):
        plain(self, step)
        if step >= 2:
            self.average.norm.weight.data.zero_()

    monkeypatch.setattr(Method, "update_ema", flat)
    said = complaint(TrainingStopped, lambda: go(settings(images, health_steps=1)))
    assert "collapsed" in said and "weights of step 2" in said
    assert "collapsing" in caplog.text
    saved = Backbone.from_pretrained(images.parent / "run" / "backbone", device="cpu")
    assert saved.norm.weight.any()


def test_verdicts(images: Path) -> None:
    """The verdicts follow the measures."""
    run = Run(settings(images), torch.device("cpu"), backbone=start())
    health, first = run.health, run.health.first
    health.first = first | {"knn": 0.8}
    cases = [
        ({}, "healthy"),
        ({"spread": 0.01 * first["spread"]}, "collapsing"),
        ({"rank_me": 0.05 * first["rank_me"]}, "collapsing"),
        ({"knn": 0.6}, "forgetting"),
        ({"patch_drift": 0.4}, "forgetting"),
        ({"teacher_entropy": 0.9999}, "collapsing"),
        ({"teacher_entropy": 0.95}, "healthy"),
    ]
    for change, verdict in cases:
        assert health.judge(health.first | change, 3)[0] == verdict, change


def test_measures_of_health() -> None:
    """RankMe counts dimensions, spread is 0 for equal features, 20-NN finds clusters."""
    assert rank_me(torch.eye(6)) == pytest.approx(6.0)
    assert rank_me(torch.ones(6, 4)) == pytest.approx(1.0)
    assert spread_of(torch.ones(6, 4)) == pytest.approx(0.0, abs=1e-12)
    assert spread_of(torch.eye(6)) == pytest.approx(1.0)
    labels = torch.arange(3).repeat(30)
    features = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(90, 3)
    assert knn_accuracy(features, labels) == 1.0
    assert knn_accuracy(torch.randn(90, 3), labels) < 0.6


# --- data --------------------------------------------------------------------------------------------------------


def test_half_broken_folder(images: Path, caplog: Any) -> None:
    """Broken images are replaced and counted, and reported once, with the reason, also over a resume."""
    for i in range(3):
        (images / f"{i}.png").write_bytes(b"no picture")
    caplog.clear()
    go(settings(images))
    assert rows(images)[-1]["broken_pictures"] == 3
    told = [line for line in caplog.messages if line.startswith("skipped an image")]
    assert len(told) == 3 and all("is a text file, not an image" in line for line in told)
    go(settings(images, steps=settings(images).steps + 2), resume=True)
    lines = (images.parent / "run" / "left_out.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert sorted(one["image"] for one in found) == [0, 1, 2]
    assert all(f"{one['image']}.png" in one["error"] for one in found)


def test_broken_and_empty_folders(images: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"no picture")
    text = complaint(InputError, lambda: go(settings(images)))
    assert "0 of 4 images tried can be read" in text and "is a text file, not an image" in text
    shutil.rmtree(images)
    images.mkdir()
    assert "holds no files" in complaint(InputError, lambda: go(settings(images)))
    assert "does not exist" in complaint(MissingFileError, lambda: go(settings(images / "nowhere")))
    assert not (images.parent / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(batch_size=1), "at least 2"),
        (dict(batch_size=16), "there are 8 images"),
        (dict(batch_size=4, accumulate=4), "spread_group"),
        (dict(batch_size=6, spread_group=4), "spread_group"),
        (dict(out=""), "out is empty; set it"),
        (dict(batch_size=4, accumulate=3), "equal parts"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_batches_that_cannot_be(images: Path, changes: dict, words: str) -> None:
    assert words in complaint(InputError, lambda: go(settings(images, **changes)))


# --- disk and resume ---------------------------------------------------------------------------------------------


def refuse(*args, **kwargs) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_for_a_while(images: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """The run continues, earlier checkpoints stay complete, no metric is lost."""
    plain, calls = run_state.save_file, []

    def full_once(*args, **kwargs):
        calls.append(1)
        refuse() if len(calls) == 2 else plain(*args, **kwargs)

    monkeypatch.setattr(run_state, "save_file", full_once)
    go(settings(images))
    assert "No space left" in caplog.text
    folder = images.parent / "run" / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["00000002", "00000006"]
    assert len(rows(images)) == 6


def test_a_disk_that_stays_full(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the end of a run is an error; once there is space, the run can be resumed."""
    plain, calls = run_state.save_file, []

    def full_later(*args, **kwargs):
        calls.append(1)
        plain(*args, **kwargs) if len(calls) == 1 else refuse()

    monkeypatch.setattr(run_state, "save_file", full_later)
    assert "No space left" in complaint(DiskError, lambda: go(settings(images)))
    monkeypatch.undo()
    assert run_state.latest(images.parent / "run" / "checkpoints").name == "00000002"
    go(settings(images), resume=True)
    assert [row["step"] for row in rows(images)] == [1, 2, 3, 4, 5, 6]


def test_wrong_resume_folder(images: Path) -> None:
    config = settings(images)
    assert "no checkpoint" in complaint(InputError, lambda: go(config, resume=True))
    go(config)
    assert "already holds a run" in complaint(InputError, lambda: go(config))
    other = settings(images, ibot_prototypes=8)
    assert "ibot_head" in complaint(CheckpointError, lambda: go(other, resume=True))
    other = settings(images, ibot_weight=0.0)
    assert "another model or other losses" in complaint(CheckpointError, lambda: go(other, resume=True))
    tensors = images.parent / "run" / "checkpoints" / "00000006" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "checksum differs" in complaint(CheckpointError, lambda: go(config, resume=True))


def test_the_command_says_what_is_wrong(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 2, with one sentence."""
    assert main(["--data", str(images), "--out", str(images.parent / "new"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dinov3-infer: error: ") and said.count("\n") == 1
