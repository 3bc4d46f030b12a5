"""Lists of images lead back to the images."""

from pathlib import Path

import numpy as np
import pytest
from pictures import complaint, photo
from PIL import Image
from stores import directions, made

from dinov3_infer import InputError
from dinov3_infer.features.disk.lists import listed_in, write_list
from dinov3_infer.train import open_data


def test_lists_lead_back_to_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer reads the absolute paths of a list, also those with line breaks."""
    monkeypatch.chdir(tmp_path)
    for names in (["a.png", "b c.png"], ["a.png", "two\nlines.png"], ["a.png", "a\ttab.png"]):
        for name in names:
            Image.fromarray(photo(8, 8)).save(tmp_path / name)
        assert write_list(tmp_path / "l.txt", names) == 2
        data = open_data(tmp_path / "l.txt")
        assert [data.sources[0].key(i) for i in range(len(data))] == [str(tmp_path / name) for name in names]
    store = made(tmp_path / "a", directions(6))
    write_list(tmp_path / "l.txt", [store.paths[2], store.paths[5]])
    assert np.flatnonzero(listed_in(store, tmp_path / "l.txt")).tolist() == [2, 5]
    write_list(tmp_path / "l.txt", ["elsewhere.png"])
    assert "names none of the 6 images" in complaint(InputError, lambda: listed_in(store, tmp_path / "l.txt"))
    assert "no image has a path" in complaint(InputError, lambda: write_list(tmp_path / "l.txt", ["", ""]))
