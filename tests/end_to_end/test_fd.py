"""The Fréchet distance: its formula, stored vectors, and sets that cannot be compared."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint, photo
from PIL import Image
from repository import EXAMPLES
from torch import Tensor

from dinov3_infer import Backbone, InputError


@pytest.fixture
def fd(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import fd

    return fd


def drawn(count: int, width: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, rank or width, generator=generator, dtype=torch.float64) @ mixing + seed


@pytest.mark.parametrize("rank", [None, 5], ids=["full rank", "flat"])
def test_the_formula_of_torchmetrics(rank: int | None, fd: Any) -> None:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 sum of sqrt(eigenvalues of S1 S2), the formula of torchmetrics, in float64."""
    for seed in (1, 2):
        a, b = drawn(300, 24, seed, rank), drawn(200, 24, seed + 1, rank)
        s1, s2 = torch.cov(a.T), torch.cov(b.T)
        crossed = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
        expected = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * crossed
        assert fd.frechet(a, b) == pytest.approx(float(expected), rel=1e-4 if rank else 1e-9)


def test_values_that_are_known(fd: Any) -> None:
    a = drawn(500, 8, 1)
    assert fd.frechet(a, a) == pytest.approx(0, abs=1e-8)
    assert fd.frechet(a, a + 2) == pytest.approx(4 * 8)
    centred = a - a.mean(0)
    assert fd.frechet(centred, 3 * centred) == pytest.approx(4 * float(torch.cov(a.T).trace()))


def write(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    for seed in seeds:
        Image.fromarray(photo(64, 64, seed=seed)).save(folder / f"{seed}.png")
    return folder


def test_folders_and_what_embed_wrote(fd: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    bb = Backbone.from_pretrained("nano")
    sets = write(tmp_path / "real", range(6)), write(tmp_path / "fake", range(20, 25))
    (sets[0] / "broken.png").write_bytes(b"no image")
    vectors = [bb.embed(folder, size=64, on_error="skip") for folder in sets]
    expected = fd.frechet(*(torch.from_numpy(v[np.isfinite(v).all(1)]).double() for v in vectors))
    for number, folder in enumerate(sets):
        bb.embed(folder, tmp_path / f"{number}.npy", size=64, on_error="skip")
    for given in ([str(s) for s in sets], [str(tmp_path / f"{n}.npy") for n in (0, 1)]):
        monkeypatch.setattr(sys, "argv", ["fd.py", *given, "--model", "nano", "--size", "64"])
        fd.main()
        value, rest = capsys.readouterr().out.split("  ")
        assert float(value) == pytest.approx(expected, abs=1e-3) and rest == "6 and 5 images, 192 numbers each\n"
    monkeypatch.setattr(sys, "argv", ["fd.py", str(tmp_path / "0.npy"), str(sets[1]), "--model", "nano"])
    assert "two files that embed wrote" in complaint(InputError, fd.main)
    bb.embed(sets[1], tmp_path / "other.npy", size=96)
    monkeypatch.setattr(sys, "argv", ["fd.py", str(tmp_path / "0.npy"), str(tmp_path / "other.npy")])
    assert "cannot be compared" in complaint(InputError, fd.main)


def test_what_has_no_distance(fd: Any) -> None:
    assert "at least 2 images, got 1" in complaint(InputError, lambda: fd.frechet(drawn(1, 4, 0), drawn(5, 4, 1)))
    assert "length 4 and 5" in complaint(InputError, lambda: fd.frechet(drawn(9, 4, 0), drawn(9, 5, 1)))
