"""Whole runs: the numbers do not depend on how they are computed, interrupted or distributed."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.errors import InputError
from dinov3_infer.train import run_state
from dinov3_infer.train.config import TrainConfig
from dinov3_infer.train.loop import Run, train
from dinov3_infer.zoo import OWN

SMALL = dict(
    steps=5, batch_size=8, num_local=2, global_px=48, local_px=32, dino_prototypes=32, ibot_prototypes=32,
    head_hidden=32, head_bottleneck=16, spread_group=2, log_steps=1, workers=0, checkpoint_steps=2, health_steps=2,
    health_pictures=4, freeze_share=0.4, ramp_share=0.2, stop_on_collapse=False, device="cpu", lr_at_1024=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images in two classes and a saved model to start from."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    for i in range(16):
        (folder / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (6, 8, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(pixels).save(folder / "images" / "ab"[i % 2] / f"{i}.png")
    start = Backbone.from_config(ViTConfig(24, 2, 2, 48), seed=0)
    for name, parameter in start.named_parameters():  # weights under which images differ
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)
        elif name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    start.save_pretrained(folder / "start")
    return folder


def settings(world: Path, name: str, **changes) -> TrainConfig:
    places = dict(data=(str(world / "images"),), model=str(world / "start"), out=str(world / name))
    return TrainConfig(**(SMALL | places | changes))


def metrics(folder: Path) -> list[dict]:
    """The metrics of a run, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def flags(config: TrainConfig) -> list[str]:
    """A configuration as a command line."""
    found = []
    for field in fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if field.type is bool:
            found.append(f"--{'' if value else 'no-'}{name}")
        elif isinstance(value, tuple):
            found += [f"--{name}", *map(str, value)] if value else []
        else:
            found += [f"--{name}", str(value)] if value != "" else []
    return found


def command(config: TrainConfig, processes: int) -> list[str]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [*launcher, "dinov3_infer.train", *flags(config)]


def run(config: TrainConfig, processes: int = 1) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(config, processes), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def same(folder: Path, other: Path, tolerance: float) -> None:
    ours, theirs = metrics(folder), metrics(other)
    assert [row["step"] for row in ours] == [0, 1, 2, 3, 4, 5]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if isinstance(a[key], float):
                bound = tolerance * (1 if "gradient" not in key else 100)
                assert a[key] == pytest.approx(b[key], rel=bound, abs=bound), (a["step"], key)


# --- however it is computed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_accumulation_recomputation_and_workers_change_nothing(world: Path, precision: str, tolerance: float) -> None:
    for name, changes in {"one": {}, "parts": dict(accumulate=4, recompute="all", workers=2)}.items():
        train(settings(world, f"{precision}-{name}", precision=precision, **changes))
    same(world / f"{precision}-parts", world / f"{precision}-one", tolerance)


OTHER_RECIPE = dict(
    ibot_prototypes=0, centring="centre", local_cls_norm=True, gram="renew", gram_begin_share=0.2, gram_ramp_share=0.4,
    gram_local_weight=0.5, gram_renew_steps=1, gram_renewals=2,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "tolerance", "changes"),
    [("float64", 1e-10, {}), ("float32", 1e-5, {}), ("float64", 1e-10, OTHER_RECIPE)],
    ids=["float64", "float32", "other recipe"],
)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_change_nothing(
    world: Path, engine: str, precision: str, tolerance: float, changes: dict
) -> None:
    """torchrun with gloo gives the same weights, average and moments, in one file."""
    alone, together = (f"{engine}-{precision}-{len(changes)}-{n}" for n in (1, 2))
    run(settings(world, alone, precision=precision, accumulate=2, **changes))
    run(settings(world, together, precision=precision, engine=engine, **changes), processes=2)
    same(world / together, world / alone, tolerance)
    ours, theirs = (
        load_file(run_state.latest(world / n / "checkpoints") / "tensors.safetensors") for n in (together, alone)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k], theirs[k], rtol=0, atol=1e3 * tolerance) for k in ours)


def test_drop_path_is_recomputed_with_the_same_draws(world: Path) -> None:
    for recompute in ("none", "cheap", "all"):
        train(settings(world, f"drop-{recompute}", drop_path=0.5, recompute=recompute, precision="float64"))
        same(world / "drop-none", world / f"drop-{recompute}", 1e-10)


def test_the_average_follows_the_weights_after_the_step(world: Path) -> None:
    """With momentum 0 the average equals the student after the step, not before it."""
    config = settings(world, "average", ema_momentum=0.0, ema_momentum_end=0.0, warmup_share=0.0, freeze_share=0.0,
                      ramp_share=0.0)  # fmt: skip
    run = Run(config, torch.device("cpu"))
    before = {name: parameter.clone() for name, parameter in run.method.student.named_parameters()}
    run.take_step(next(run.stream()))
    assert all(torch.equal(run.method.ema.get_parameter(n), p) for n, p in run.method.student.named_parameters())
    moved = [name for name, p in run.method.student.named_parameters() if not torch.equal(p, before[name])]
    assert {name.split(".")[0] for name in moved} == {"backbone", "dino_head", "ibot_head"}


# --- interrupted -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["after a step", "while writing a checkpoint"])
def test_killed_and_resumed_is_the_same_bit_for_bit(world: Path, moment: str, tmp_path: Path) -> None:
    """After SIGKILL and --resume, metrics, checkpoint and model equal those of an undisturbed run."""
    whole, killed = settings(world, "whole"), settings(world, f"killed-{moment.split()[0]}")
    if not (world / "whole").exists():
        run(whole)
    # the process kills itself at the given moment of step 3, or of the checkpoint after step 4
    hook = {
        "after a step": ("loop", "m.Run", "take_step", 4),
        "while writing a checkpoint": ("run_state", "m", "save_file", 2),
    }[moment]
    script = tmp_path / "killed.py"
    script.write_text(
        "from dinov3_infer.train import {} as m\nowner, name, when = {}, {!r}, {}\n".format(*hook)
        + "import os, signal, sys\nplain, calls = getattr(owner, name), []\n"
        "def wrapped(*args, **kwargs):\n    calls.append(1)\n    found = plain(*args, **kwargs)\n"
        "    if len(calls) == when: os.kill(os.getpid(), signal.SIGKILL)\n    return found\n"
        "setattr(owner, name, wrapped)\nfrom dinov3_infer.train.command import main\nmain(sys.argv[1:])\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script), *flags(killed)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert run_state.latest(Path(killed.out) / "checkpoints").name == "00000002"
    resume = [sys.executable, "-m", "dinov3_infer.train", "--resume", "--out", killed.out]  # the folder is enough
    assert subprocess.run(resume, env=environment).returncode == 0
    assert metrics(Path(killed.out)) == metrics(Path(whole.out))
    for file in ("checkpoints/00000005/tensors.safetensors", "backbone/model.safetensors"):
        ours, theirs = load_file(Path(killed.out) / file), load_file(Path(whole.out) / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not list((Path(killed.out) / "checkpoints").glob(".*"))


def test_resumed_in_process(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run continues to the same metrics and weights."""
    expected = train(settings(world, "uninterrupted"))
    taken, plain = [], Run.take_step

    def interrupted(self, batch):
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return plain(self, batch)

    monkeypatch.setattr(Run, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings(world, "interrupted"))
    monkeypatch.undo()
    found = train(settings(world, "interrupted"), resume=True)
    assert metrics(world / "interrupted") == metrics(world / "uninterrupted")
    assert found.fingerprint() == expected.fingerprint()


# --- what comes out ----------------------------------------------------------------------------------------------


def test_the_result_loads_and_has_moved(world: Path) -> None:
    """`out` holds a model in Hugging Face's layout, the curves, the first batch and the settings."""
    made = train(settings(world, "result"))
    loaded = Backbone.from_pretrained(world / "result" / "backbone", device="cpu")
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.fingerprint() != Backbone.from_pretrained(world / "start", device="cpu").fingerprint()
    assert {"config.json", "curves.png", "first_batch.png", "metrics.jsonl"} <= {
        p.name for p in (world / "result").iterdir()
    }
    assert Image.open(world / "result" / "curves.png").size[0] > 500
    assert [p.name for p in sorted((world / "result" / "checkpoints").iterdir())] == ["00000004", "00000005"]
    assert "knn" in metrics(world / "result")[-1]


def test_a_result_that_transformers_cannot_hold_is_written_all_the_same(world: Path) -> None:
    start = Backbone.from_config(ViTConfig(24, 2, 2, 48, layerscale=False), seed=0)
    made = train(settings(world, "unscaled"), backbone=start)
    loaded = Backbone.from_pretrained(world / "unscaled" / "backbone", device="cpu")
    assert loaded.fingerprint() == made.fingerprint() and loaded.config == made.config


def test_a_norm_for_local_crops_leaves_a_plain_model(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The norm is trained; transformers' layout cannot hold it and the log says so; the features are complete."""
    made = train(settings(world, "local-norm", local_cls_norm=True))
    assert made.config.local_cls_norm and not torch.equal(made.local_cls_norm.weight, made.norm.weight)
    loaded = Backbone.from_pretrained(world / "local-norm" / "backbone", device="cpu")
    assert not loaded.config.local_cls_norm and loaded.fingerprint() == made.fingerprint()
    assert "local_cls_norm" in caplog.text


def test_adapters_are_merged_into_the_result(world: Path) -> None:
    """LoRA gives a plain model with changed linear layers and unchanged norms."""
    train(settings(world, "lora", tune="lora", lora_rank=2))
    state, start = (load_file(world / n / "model.safetensors") for n in ("lora/backbone", "start"))
    assert state.keys() == start.keys()
    moved = {name for name in state if not torch.equal(state[name], start[name])}
    assert moved and all("proj" in name and name.endswith("weight") and "embed" not in name for name in moved)


def test_a_dataset_and_a_live_model(world: Path) -> None:
    """From Python, any torch Dataset and any float32 backbone can be used."""
    data = TensorDataset(torch.randint(0, 255, (9, 3, 60, 80), dtype=torch.uint8))
    backbone = Backbone.from_config(ViTConfig(24, 2, 2, 48), seed=1)
    made = train(settings(world, "live", steps=2), data=data, backbone=backbone)
    assert made.embed_dim == 24
    with pytest.raises(InputError, match="float32|dtype"):
        train(settings(world, "halved"), data=data, backbone=backbone.bfloat16())


@pytest.mark.slow
def test_the_example_of_a_fine_tune(world: Path, tmp_path: Path) -> None:
    """The script runs as its first lines describe."""
    script = [sys.executable, str(ROOT / "examples" / "finetune.py")]
    argv = [str(world / "images"), str(tmp_path / "run"), str(world / "start"), "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*script, *argv], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "16 images, 2 steps of 16" in done.stdout and "20-NN" in done.stdout and "width 24" in done.stdout


def test_new_heads_soon_tell_images_apart(tmp_path: Path) -> None:
    """On crops of a photograph with a frozen backbone, the DINO loss falls below a uniform guess within 40 steps."""
    photo = torch.from_numpy(np.array(Image.open(ROOT / "examples" / "cat.jpg").convert("RGB"))).permute(2, 0, 1)
    height, width = photo.shape[1:]
    places = [(y, x) for y in range(0, height - 64, 32) for x in range(0, width - 64, 32)]
    cuts = [photo[:, y : y + 64, x : x + 64] for y, x in places][:64]
    config = TrainConfig(
        model="nano", out=str(tmp_path), steps=40, batch_size=32, num_local=0, global_px=32, dino_prototypes=256,
        head_hidden=256, head_bottleneck=64, ibot_weight=0.0, koleo_weight=0.0, freeze_share=1.0, health_steps=40,
        health_pictures=8, workers=0, device="cpu",
    )  # fmt: skip
    train(config, data=TensorDataset(torch.stack(cuts)))
    last = metrics(tmp_path)[-1]
    assert last["dino_global"] < 0.98 * math.log(256) and last["teacher_entropy"] < 0.8
    assert last["verdict"] == "healthy"


@pytest.mark.parametrize(
    ("changes", "licence"),
    [
        (dict(from_scratch=True), OWN),
        ({}, "Apache-2.0"),
        (dict(from_scratch=True, teacher="nano", feature_weight=1.0), "Apache-2.0"),
    ],
    ids=["from scratch", "from released weights", "from a teacher"],
)
def test_the_licence_of_what_came_out(changes: dict, licence: str, world: Path, tmp_path: Path) -> None:
    """Weights from random ones belong to their author, also in the folder, unless there was a teacher."""
    result = train(settings(world, str(tmp_path), model="nano", steps=1, **changes))
    for bb in (result, Backbone.from_pretrained(tmp_path / "backbone", device="cpu")):
        assert bb.info is not None and (bb.info.name, bb.info.licence) == ("nano", licence)
