"""A store is read in blocks, and other files raise an error."""

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import complaint
from stores import directions, made

from dinov3_infer import InputError, MissingFileError
from dinov3_infer.features.disk import store as store_module
from dinov3_infer.features.disk.formats import FORMATS
from dinov3_infer.features.disk.store import Store


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes blocks small, so that a few rows fill several of them."""
    monkeypatch.setattr(store_module.Store.blocks, "__defaults__", (7,))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_store_is_read_in_blocks(suffix: str, tmp_path: Path) -> None:
    """Blocks hold rows of length 1 and the number of the first row, over all shards; names and failures match."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    vectors = 3 * directions(23)
    store = made(tmp_path / "a", vectors, broken=(4, 11), suffix=suffix)
    blocks = list(store.blocks())
    assert [first for first, _ in blocks] == [0, 5, 10, 15, 20] and len(store) == 23 and store.width == 16
    found = np.concatenate([block for _, block in blocks])
    good = np.delete(np.arange(23), [4, 11])
    np.testing.assert_allclose(found[good], vectors[good] / 3, rtol=1e-5)
    assert np.isnan(found[[4, 11]]).all() and np.flatnonzero(~store.good).tolist() == [4, 11]
    assert store.paths[11] == f"a{suffix}/11.png" and len(store.paths) == 23


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    made(tmp_path / "a", directions(12))
    assert "no vectors at" in complaint(MissingFileError, lambda: Store(tmp_path / "none.npy"))
    assert "was not written by embed" in complaint(InputError, lambda: Store(tmp_path))
    np.save(tmp_path / "plain.npy", np.zeros((3, 4)))
    assert "has no record of its settings" in complaint(InputError, lambda: Store(tmp_path / "plain.npy"))
    record = tmp_path / "a.npy" / "dinov3_infer.json"
    whole = record.read_text()
    record.write_text(json.dumps(json.loads(whole) | {"kind": "map"}))
    assert "holds map" in complaint(InputError, lambda: Store(tmp_path / "a.npy"))
    record.write_text(whole)
    (tmp_path / "a.npy" / "000001.npy").unlink()
    assert "holds 2 of 3 shards; run the same embed again" in complaint(InputError, lambda: Store(tmp_path / "a.npy"))
    record.write_text("{}")
    assert "is damaged" in complaint(InputError, lambda: Store(tmp_path / "a.npy"))
