"""Damaged shards, files, lists and records are computed again or reported in one sentence, and never used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outputs import OPTIONS, OUTS, age, files
from pictures import complaint

from dinov3_infer import Backbone, InputError
from dinov3_infer.features.disk.store import Store

# --- damage ---------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0" * 8)


def flipped(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def flipped_at_the_end(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


def gone(path: Path) -> None:
    path.unlink()


def another_shard(path: Path) -> None:
    """Puts the first shard, complete and sealed, in the place of the second."""
    for side in path.parent.glob("000000.*"):
        shutil.copy(side, path.with_suffix(side.suffix))


DAMAGE = [cut, emptied, longer, flipped, flipped_at_the_end, zeroed, gone]


@pytest.mark.parametrize("damage", [*DAMAGE, another_shard], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("out", ["x/", "x.safetensors/", "x.parquet/"])
def test_damaged_shards_are_made_again(damage: Callable[[Path], None], out: str, bb: Backbone, album: Path) -> None:
    """Each file of a shard is damaged: its vectors, its list and its record."""
    out = f"{album.parent}/{out}"
    bb.embed(album, out, **OPTIONS)
    whole = {path.name: path.read_bytes() for path in files(out)}
    for name in [name for name in whole if name.startswith("000001.")]:
        damage(Path(out) / name)
        if not (damage is gone and name.endswith(".json")):
            with pytest.raises(InputError):
                Store(out, verify=True)
        try:
            bb.embed(album, out, **OPTIONS)
        except InputError as error:
            assert name in str(error) or "000001" in str(error)
            (Path(out) / name).unlink(missing_ok=True)
            bb.embed(album, out, **OPTIONS)
        if damage is gone and name.endswith(".json"):  # as in an old output without checksums
            (Path(out) / "000001.npy").unlink()
            bb.embed(album, out, **OPTIONS)
        assert {path.name: path.read_bytes() for path in files(out)} == whole


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("out", ["x.npy", "x.safetensors", "x.parquet"])
def test_damaged_files_are_named(damage: Callable[[Path], None], out: str, bb: Backbone, album: Path) -> None:
    """The damage is reported, no row counts as done, and overwriting computes them again."""
    out = f"{album.parent}/{out}"
    bb.embed(album, out, **OPTIONS)
    whole = {path: path.read_bytes() for path in files(out)}
    for path in whole:
        damage(path)
        if not (damage is gone and path == Path(out)):  # without it there is no output
            if damage is gone and path.suffix == ".json":
                assert "not written by embed" in complaint(InputError, lambda: bb.embed(album, out, **OPTIONS))
            else:
                text = complaint(InputError, lambda: bb.embed(album, out, **OPTIONS))
                assert path.name in text or Path(out).name in text
        bb.embed(album, out, overwrite=True, **OPTIONS)
        assert {p: p.read_bytes() for p in files(out)} == whole


@pytest.mark.parametrize("out", OUTS)
def test_every_byte_counts(out: str, bb: Backbone, album: Path) -> None:
    """`Store(verify=True)` notices a flipped bit anywhere, or the bit changes the record, which is compared."""
    out = f"{album.parent}/{out}"
    bb.embed(album, out, **OPTIONS)
    path = next(p for p in files(out) if p.suffix == (Path(out).suffix or ".npy"))
    whole = path.read_bytes()
    silent = []
    for at in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            Store(out, verify=True)
            silent.append(int(at))
        except InputError:
            pass
    path.write_bytes(whole)
    Store(out, verify=True)
    assert not silent


def test_opening_looks_at_sizes_and_counts(bb: Backbone, album: Path) -> None:
    """A shard that is too short or in the wrong place would shift the names of all later rows."""
    out = album.parent / "x"
    bb.embed(album, f"{out}/", **OPTIONS)
    np.save(out / "000001.npy", np.load(out / "000001.npy")[:2])
    assert "000001.npy" in complaint(InputError, lambda: Store(out))
    text = complaint(InputError, lambda: bb.embed(album, f"{out}/", **OPTIONS))
    assert "holds 2 rows, but embed wrote 4" in text
    for path in out.glob("000001.*"):
        path.rename(path.with_name(path.name.replace("000001", "000007")))
    assert "holds 2 of 3 shards" in complaint(InputError, lambda: Store(out))


# --- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "", "[]", "null", "{}", '{"format": 2}', "\xff\xfe", "[" * 100_000, '{"format": "x"}', '{"format": 99}',
], ids=lambda text: ascii(text)[:12])  # fmt: skip
@pytest.mark.parametrize("out", ["x/", "x.npy"])
def test_a_damaged_record_is_one_sentence(text: str, out: str, bb: Backbone, album: Path) -> None:
    out = f"{album.parent}/{out}"
    bb.embed(album, out, **OPTIONS)
    record = Path(out) / "dinov3_infer.json" if out.endswith("/") else Path(out).with_suffix(".json")
    record.write_bytes(text.encode("latin-1"))
    for call in (lambda: bb.embed(album, out, **OPTIONS), lambda: Store(out)):
        assert str(record.with_suffix("")).rpartition("/")[2] in complaint(InputError, call)


@pytest.mark.parametrize("field, value", [
    ("count", "10"), ("count", -1.5), ("shape", "abc"), ("shape", [1, None]), ("plan", []),
    ("plan", {"shard_size": "x"}),
    ("preprocess", 3), ("architecture", None), ("normalize", "yes"), ("fingerprint", 7), ("more", 1), ("rows", "x"),
    ("files", [1]), ("state", "odd"),
], ids=str)  # fmt: skip
def test_every_field_of_a_record_is_looked_at(field: str, value: Any, bb: Backbone, album: Path) -> None:
    bb.embed(album, f"{album.parent}/x/", **OPTIONS)
    record = album.parent / "x" / "dinov3_infer.json"
    record.write_text(json.dumps(without_own(record) | {field: value}))
    assert "is damaged" in complaint(InputError, lambda: bb.embed(album, f"{album.parent}/x/", **OPTIONS))


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"row": 0}', '{"path": 3, "error": "", "grid": null}', "\xff"], ids=ascii
)
def test_a_damaged_list_is_one_sentence(line: str, bb: Backbone, album: Path) -> None:
    """The list is part of an old output and has no checksum."""
    out = f"{album.parent}/x.npy"
    bb.embed(album, out, **OPTIONS)
    age(out)
    lines = (album.parent / "x.jsonl").read_bytes().splitlines()
    (album.parent / "x.jsonl").write_bytes(b"\n".join([*lines[:4], line.encode("latin-1"), *lines[5:]]) + b"\n")
    assert "x.jsonl" in complaint(InputError, lambda: bb.embed(album, out, **OPTIONS))
    assert "x.jsonl" in complaint(InputError, lambda: Store(out).paths)


def without_own(record: Path) -> dict[str, Any]:
    """Removes the checksum of the record itself, which would otherwise report the damage first."""
    return {name: value for name, value in json.loads(record.read_text()).items() if name != "own"}
