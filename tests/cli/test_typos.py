"""Suggestions for mistyped commands, options and choices."""

from pathlib import Path

import pytest
from pictures import complaint

from dinov3_infer import Backbone, InputError
from dinov3_infer.cli.main import main
from dinov3_infer.typos import did_you_mean

TYPOS = {
    "embd a.png -o v.npy": "there is no command 'embd'; did you mean 'embed'?",
    "doctr": "did you mean 'doctor'?",
    "search a.png v.npy": "did you mean 'embed search'?",
    "embed serach a.png v.npy": "there is no command 'embed serach'; did you mean 'embed search'?",
    "embed curat v.npy -o l.txt": "did you mean 'embed curate'?",
    "show pcs a.png -o x.png": "there is no kind 'pcs'; did you mean 'pca'?",
    "embed a.png -o v.npy --sise 64": "there is no option '--sise'; did you mean '--size'?",
    "embed a.png -o v.npy --sise=64": "there is no option '--sise'; did you mean '--size'?",
    "embed a.png --ouput v.npy": "did you mean '--out'?",
    "embed dedup v.npy -o l.txt --treshold 0.5": "did you mean '--threshold'?",
    "show attention a.png -o x.png --lyer 3": "did you mean '--layer'?",
    "embed a.png -o v.npy --fit sqash": "argument --fit: there is no 'sqash'; did you mean 'squash'?",
    "convert a b --to timmm": "did you mean 'timm'?",
    "train --dta x": "there is no option '--dta'; did you mean '--data'?",
    "train --preset adpt": "did you mean 'adapt'?",
    "--vresion": "did you mean '--version'?",
}


@pytest.mark.parametrize("typed", TYPOS)
def test_a_typo_gets_a_suggestion(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The suggestion comes before an error about a missing option, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(typed.split()) == 2
    said = capsys.readouterr().err
    assert TYPOS[typed] in said and "required" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("typed", ["frobnicate", "embed a.png -o v.npy --xyzzy 3", "embed -o v.npy -- --sise"])
def test_what_is_like_nothing_gets_none(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(typed.split()) in (1, 2)
    assert "did you mean" not in capsys.readouterr().err


def test_a_file_of_such_a_name_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serach").mkdir()
    assert main(["embed", "serach", "-o", "v.npy"]) == 1
    assert "no command" not in capsys.readouterr().err


def test_did_you_mean() -> None:
    assert did_you_mean("Embd", ["embed", "show"]) == "; did you mean 'embed'?"
    assert did_you_mean("x", ["embed"]) == did_you_mean("embed", []) == ""


@pytest.mark.parametrize("device", ["mps", "cuda:99", "xpu", "hpu", "vulkan", "xla", "hip", "gpu", "cuda:-2", ""])
def test_a_device_that_is_not_here_is_said(device: str) -> None:
    """The error is the same for each exception of torch."""
    try:
        Backbone.from_pretrained("nano", device=device)
    except InputError:
        assert "device" in complaint(InputError, lambda: Backbone.from_pretrained("nano", device=device))
