"""Names and numbers of images from several sources."""

import os
import pickle

from dinov3_infer.images.sources import Names


def test_names_in_one_piece() -> None:
    names = ["a", "", "d/é.png", os.fsdecode(b"caf\xe9"), "x" * 300, "two\nlines"]
    assert list(Names(names)) == names and len(Names([])) == 0
    assert list(pickle.loads(pickle.dumps(Names(names)))) == names
