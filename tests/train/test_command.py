"""The command line of the trainer."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from repository import ROOT

from dinov3_infer.train.command import COMMON, main, parse
from dinov3_infer.train.config import TrainConfig


def test_preset_file_and_flags(tmp_path: Path) -> None:
    """Flags override the file, which overrides the preset."""
    file = tmp_path / "mine.toml"
    file.write_text('preset = "dinov3"\nsteps = 7\nglobal_scale = [0.5, 1.0]\nsizes = ["512/112/768:0.3"]\n')
    config, given = parse(["--config", str(file), "--data", "a", "b:0.1:pure", "--batch-size", "8", "--no-distortions"])
    assert config == TrainConfig.preset(
        "dinov3", steps=7, global_scale=(0.5, 1.0), sizes=("512/112/768:0.3",), data=("a", "b:0.1:pure"), batch_size=8,
        distortions=False,
    )  # fmt: skip
    assert not given.resume and not given.dry_run


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_examples_are_configurations(path: Path) -> None:
    """Each example file parses, and names its source in a comment."""
    parse(["--config", str(path), "--data", "x"])
    assert path.read_text().startswith("# ")


def test_help_says_what_the_fields_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Help has every setting below its heading, with its text and its default."""
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name.replace('_', '-')}" in said for field in fields(TrainConfig))
    assert (
        "optimiser (AdamW): --lr-at-1024 X learning rate for a batch of 1024, multiplied by sqrt(--batch-size / 1024)"
        in said
    )
    assert all(path.stem in said for path in (ROOT / "examples" / "configs").glob("*.toml"))  # and for what each is
    assert "--global-scale X X share of the image's area in a global crop, as DINOv3 (default: 0.32 1.0)" in said


def test_help_begins_with_what_most_runs_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.partition("most used:")[2].splitlines()
    flags = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
    assert flags[:10] == [f"--{name.replace('_', '-')}" for name in COMMON] and len(flags) > 60


def test_errors_name_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", "x", "--mask-share", "0", "--out", str(tmp_path / "mask_share")]) == 2
    assert "set --ibot-weight 0" in capsys.readouterr().err
    (tmp_path / "batch_size").mkdir()
    assert main(["--data", str(tmp_path / "batch_size"), "--out", str(tmp_path / "run"), "--model", "nano"]) == 2
    assert f"{tmp_path}/batch_size" in capsys.readouterr().err


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run prints settings and memory and draws the first batch; a run can use the folder afterwards."""
    for i in range(4):
        Image.new("RGB", (60, 50), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    argv = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--model", "nano", "--from-scratch", "--device",
            "cpu", "--batch-size", "4", "--accumulate", "2", "--global-px", "64", "--local-px", "32",
            "--dino-prototypes", "8", "--ibot-prototypes", "8", "--head-hidden", "8", "--head-bottleneck", "4",
            "--workers", "0"]  # fmt: skip
    assert main([*argv, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batch_size"] == 4 and said["images"] == 4 and said["gib_of_activations_at_most"] > 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first_batch.png"]
