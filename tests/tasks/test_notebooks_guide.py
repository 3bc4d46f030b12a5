"""The guide on notebooks and probes says what is so."""

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from repository import EXAMPLES

from dinov3_infer.cli.parser import parse

GUIDE = (EXAMPLES / "guides" / "notebooks-and-probes.md").read_text(encoding="utf-8")
PEERS = re.compile(r"^(?:from|import) (sklearn|sentence_transformers|timm|anomalib)", re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cat.jpg, dog.jpg and photos of two classes."""
    shutil.copy(EXAMPLES / "cat.jpg", tmp_path)
    cat = Image.open(tmp_path / "cat.jpg")
    cat.rotate(90).save(tmp_path / "dog.jpg")
    for name, turned in (("cat", 0), ("dog", 90)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            cat.crop((30 * i, 0, 30 * i + 200, 200)).rotate(turned).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(wanted: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}  # timm looks the module of a model up
    for block in blocks("python"):
        if wanted(PEERS.findall(block)):
            exec(block, names)
    return names


def test_its_code_runs(folder: Path) -> None:
    names = ran(lambda needs: not needs)
    assert [Image.open(f"{one}.png").width > 500 for one in ("pca", "similarity", "attention")] == [True] * 3
    assert names["probe"].classes_.tolist() == ["cat", "dog"] and names["probe"].score(names["vectors"], names["names"])
    assert np.asarray(names["f"]).shape == (1, 192) and torch.equal(
        names["batch"][1].embedding, names["batch"][0].embedding
    )
    assert names["bb"].is_gradient_checkpointing


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # of other projects
def test_its_code_for_other_projects_runs(folder: Path) -> None:
    ran(lambda needs: all(find_spec(package) for package in needs))


def test_its_commands_are_valid(folder: Path) -> None:
    for block in blocks("bash"):
        for line in block.splitlines():
            assert parse(shlex.split(line)[1:]).command


def test_its_tables_are_true() -> None:
    """Every probe has a line, and so has every option that all commands have."""
    from dinov3_infer import tasks

    probes = [name for name in tasks.__all__ if name.endswith("Probe") and name != "Probe"]
    assert all(f"`{name}(" in GUIDE for name in (*probes, "KNN"))
    assert all(f"`{flag}`" in GUIDE for flag in ("-v", "--verbose", "-q", "--quiet", "--debug"))
