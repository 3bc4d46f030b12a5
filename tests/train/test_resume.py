"""A resumed run must have the images, settings, checkpoints and records of the run that was started."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import complaint
from PIL import Image
from repository import ROOT

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.errors import CheckpointError, InputError
from dinov3_infer.locks import locked
from dinov3_infer.train.command import main, parse
from dinov3_infer.train.config import TrainConfig
from dinov3_infer.train.datasets import open_data
from dinov3_infer.train.loop import train

SMALL: dict[str, Any] = dict(
    steps=4, batch_size=4, num_local=0, global_px=32, dino_prototypes=16, ibot_prototypes=16, head_hidden=16,
    head_bottleneck=8, spread_group=2, log_steps=1, workers=0, checkpoint_steps=2, health_steps=100, health_pictures=4,
    freeze_share=0.0, ramp_share=0.0, device="cpu", stop_on_collapse=False,
)  # fmt: skip


def fill(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def settings(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**(SMALL | dict(data=(str(folder / "images"),), out=str(folder / "run")) | changes))


def go(config: TrainConfig, resume: bool = False) -> Backbone:
    return train(config, backbone=Backbone.from_config(ViTConfig(24, 2, 2, 48), seed=0), resume=resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    fill(folder / "images")
    go(settings(folder))
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A folder with images and a finished run on them."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


# --- images and settings ------------------------------------------------------------------------------------------


def removed(images: Path) -> None:
    (images / "3.png").unlink()


def added(images: Path) -> None:
    shutil.copy(images / "3.png", images / "9.png")


def renamed(images: Path) -> None:
    (images / "3.png").rename(images / "9.png")


def rewritten(images: Path) -> None:
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(images / "3.png")


@pytest.mark.parametrize("change", [removed, added, renamed, rewritten], ids=lambda change: change.__name__)
def test_other_images_are_refused(change: Callable[[Path], None], place: Path) -> None:
    change(place / "images")
    text = complaint(InputError, lambda: go(settings(place, steps=6), resume=True))
    assert "started with other images" in text and str(place / "run") in text


def test_a_folder_may_be_moved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a run may be moved with its contents, and be named by another path."""
    before = open_data(place / "images").digest()
    monkeypatch.chdir(place)
    assert open_data("images").digest() == before
    (place / "images").rename(place / "elsewhere")
    assert open_data("elsewhere").digest() == before
    go(settings(place, steps=6, data=("elsewhere",)), resume=True)


@pytest.mark.parametrize("change", [dict(seed=5), dict(batch_size=8)], ids=str)
def test_another_seed_or_batch_size_is_refused(change: dict[str, Any], place: Path) -> None:
    assert next(iter(change)) in complaint(InputError, lambda: go(settings(place, **change), resume=True))


def test_other_settings_are_named(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(settings(place, steps=6, workers=1), resume=True)
    assert "settings changed since the checkpoint: steps 4 -> 6" in caplog.text


# --- records --------------------------------------------------------------------------------------------------------


def put(**values: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | values).encode()


def without(name: str) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != name}).encode()


def text(content: str) -> Callable[[bytes], bytes]:
    return lambda _: content.encode("latin-1")


def flip(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 8]) + content[-99:]


STATE, TENSORS = "checkpoints/00000004/state.json", "checkpoints/00000004/tensors.safetensors"


@pytest.mark.parametrize("name, change", [
    *((STATE, text(t)) for t in ("", "[]", "null", "3", "{}", "\xff", "[" * 100_000)),
    *((STATE, put(step=v)) for v in ("x", None, 3, 4.0, True, -4)), (STATE, without("step")), (STATE, put(config=[])),
    (STATE, put(sha256="x")), (TENSORS, flip), (TENSORS, lambda c: c[:-10]), (TENSORS, text("")),
    (TENSORS, lambda c: c + b"0"), (STATE, put(data="0" * 64)), (STATE, put(config={"seed": 9})),
    *(("config.json", text(t)) for t in ("", "[]", "null", "\xff", "{", "[" * 100_000)),
    *(("config.json", put(**{k: v})) for k, v in (
        ("steps", "4"), ("steps", 4.5), ("steps", True), ("seed", "0"), ("out", 3), ("data", "images"),
        ("betas", [0.9]),
        ("betas", ["a", "b"]), ("gram", "x"), ("compile", 1), ("lr_at_1024", None), ("nothing", 1), ("steps", -1),
        ("batch_size", 8), ("seed", 1), ("sizes", [1]),
    )),
])  # fmt: skip
def test_damage_is_one_sentence(
    name: str, change: Callable[[bytes], bytes], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file or the difference, and the remedy; the run is unchanged."""
    path = place / "run" / name
    path.write_bytes(change(path.read_bytes()))
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    argv = ["--out", str(place / "run"), "--resume"] + (
        [] if name == "config.json" else ["--data", str(place / "images")]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dinov3_infer.train.loop.build_method", _never)
        status = main(argv)
    said = capsys.readouterr().err
    if "never" in said:  # what a checkpoint says is looked at after the model is there
        config = parse(argv)[0]
        said = complaint((InputError, CheckpointError), lambda: go(config, resume=True))  # type: ignore[arg-type]
        status = 2
    assert status == 2 and said.count("\n") <= 1
    assert path.name in said or path.parent.name in said or "started with" in said or "the run in" in said
    assert {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()} == before


def _never(*_: Any) -> None:
    raise InputError("never")


def test_a_damaged_checkpoint_may_be_removed(place: Path) -> None:
    """The checkpoint before it is complete."""
    (place / "run" / TENSORS).write_bytes(b"")
    said = complaint(CheckpointError, lambda: go(settings(place), resume=True))
    assert "remove that folder and --resume, which continues from the checkpoint before" in said
    shutil.rmtree(place / "run" / "checkpoints" / "00000004")
    go(settings(place), resume=True)


def test_a_checkpoint_without_a_state_is_named(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    (place / "run" / STATE).unlink()
    go(settings(place), resume=True)
    assert "00000004', which has no state.json" in caplog.text


def test_old_checkpoints_are_resumed(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Older versions wrote no checksums and digests; the log names what was not checked."""
    path = place / "run" / STATE
    path.write_bytes(without("sha256")(without("data")(path.read_bytes())))
    go(settings(place, steps=6), resume=True)
    assert "its tensors are not checked" in caplog.text and "does not record its images" in caplog.text


@pytest.mark.parametrize("line", ['{"a": 1}', "[]", "{", '{"step": "x"}', "\xff", '{"step": null}'], ids=ascii)
def test_damaged_metrics_are_named_and_left_out(line: str, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = place / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(line.encode("latin-1") + b"\n" + whole + b'{"step": 5, "lo')
    go(settings(place), resume=True)
    assert "metrics.jsonl': removed 1 damaged lines" in caplog.text
    assert path.read_bytes() == whole


# --- two runs, and stops --------------------------------------------------------------------------------------------


def _hold(folder: Path, ready: Any, done: Any) -> None:
    with locked(folder, folder):
        ready.set()
        done.wait(30)


@pytest.mark.skipif(os.name == "nt", reason="locks")
@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_a_second_run_into_a_folder_is_refused(resume: bool, place: Path) -> None:
    """This holds before the first checkpoint too; the lock ends with its process."""
    if not resume:
        shutil.rmtree(place / "run")
        (place / "run").mkdir()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(place / "run", ready, done))
    process.start()
    assert ready.wait(60)
    assert "another run is writing" in complaint(InputError, lambda: go(settings(place), resume=resume))
    process.kill()
    process.join()
    go(settings(place), resume=resume)
    assert not list((place / "run").glob(".*"))


def test_an_unwell_run_goes_on_saving(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed run continues to write checkpoints with stop_on_collapse=False."""
    from dinov3_infer.train.health import Health

    shutil.rmtree(place / "run")
    monkeypatch.setattr(Health, "judge", lambda *_: ("collapsing", "as told"))
    go(settings(place, health_steps=1, stop_on_collapse=False))
    assert [p.name for p in sorted((place / "run" / "checkpoints").iterdir())] == ["00000002", "00000004"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_told_to_stop_keeps_its_steps(number: int, status: int, workers: int, place: Path) -> None:
    """It writes a checkpoint of its step; the resumed run equals an undisturbed one."""
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SMALL.items()
                     if name not in ("workers", "steps", "checkpoint_steps", "stop_on_collapse"))  # fmt: skip
    argv = ["train", "--data", str(place / "images"), "--out", str(place / "new"), "--model", "nano", *given.split(),
            "--steps", "400", "--checkpoint-steps", "200", "--workers", str(workers)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    started = subprocess.Popen(
        [sys.executable, "-m", "dinov3_infer", *argv], stderr=subprocess.PIPE, text=True, env=environment
    )
    metrics = place / "new" / "metrics.jsonl"
    begun = time.monotonic()
    while time.monotonic() - begun < 100 and not (metrics.is_file() and len(metrics.read_bytes().splitlines()) > 3):
        time.sleep(0.01)
    started.send_signal(number)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == status and "Traceback" not in said, said
    (kept,) = (place / "new" / "checkpoints").iterdir()
    step = int(kept.name)
    assert 3 <= step < 200 and f"stopped at step {step} of 400; --resume continues from there" in said
