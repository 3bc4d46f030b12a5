"""Vectors on disk, in the form that embed writes."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dinov3_infer.features.disk.formats import FORMATS, Line, Rows
from dinov3_infer.features.disk.recipe import BatchPlan, Recipe
from dinov3_infer.features.disk.store import Store

RECIPE = Recipe(
    "0",
    None,
    "f" * 64,
    {},
    {},
    "exact",
    "float32",
    "embedding",
    "cls",
    False,
    "float32",
    (4,),
    0,
    None,
    BatchPlan(5, 1, 1),
)


def made(path: Path, vectors: np.ndarray, broken: tuple[int, ...] = (), suffix: str = ".npy") -> Store:
    """Writes vectors to a folder of shards with five rows each."""
    vectors = vectors.astype(np.float32)
    vectors[list(broken)] = np.nan
    path = path.with_suffix(suffix)
    path.mkdir()
    form = FORMATS[suffix]()
    recipe = replace(RECIPE, count=len(vectors), shape=vectors.shape[1:])
    for first in range(0, len(vectors), 5):
        rows = Rows(first, vectors[first : first + 5], "float32")
        for i in range(first, first + len(rows.vectors)):
            rows.lines.append(Line(f"{path.name}/{i}.png", "cannot read" if i in broken else ""))
        form.write(path / f"{first // 5:06d}{suffix}", rows, recipe)
    (path / "dinov3_infer.json").write_text(recipe.to_json())
    return Store(path)


def directions(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)
