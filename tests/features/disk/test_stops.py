"""Left-over files, overwriting, runs that are stopped, and two runs at once."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outputs import COUNT, OPTIONS, OUTS, Stop, files, fill, plain, rows
from pictures import complaint

from dinov3_infer import Backbone, InputError
from dinov3_infer.features.disk import write
from dinov3_infer.features.disk.store import Store
from dinov3_infer.locks import locked

# --- left-over files-------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["x.npy", "x.safetensors", "x.parquet"])
@pytest.mark.parametrize("others", [dict(pooling="mean"), dict(size=48), dict(normalize=True)], ids=str)
def test_parts_without_a_record_are_never_joined(out: str, others: Any, bb: Backbone, album: Path) -> None:
    out, parts = f"{album.parent}/{out}", Path(f"{album.parent}/{out}.parts")
    suffix = Path(out).suffix
    bb.embed(album, f"{album.parent}/other{suffix}/", **OPTIONS | others)
    shutil.copytree(album.parent / f"other{suffix}", parts)
    (parts / "dinov3_infer.json").unlink()
    bb.embed(album, out, **OPTIONS)
    np.testing.assert_allclose(rows(out), plain(bb, album), atol=1e-6)
    assert not parts.exists()
    parts.mkdir()
    (parts / "mine.txt").write_text("of somebody else")
    assert "mine.txt" in complaint(InputError, lambda: bb.embed(album, out, **OPTIONS))
    assert (parts / "mine.txt").exists()


@pytest.mark.parametrize("others", [dict(pooling="mean"), dict(size=48)], ids=str)
def test_a_shard_of_other_settings_is_no_part_of_a_folder(others: Any, bb: Backbone, album: Path) -> None:
    bb.embed(album, f"{album.parent}/x/", **OPTIONS)
    bb.embed(album, f"{album.parent}/y/", **OPTIONS | others)
    for path in (album.parent / "y").glob("000001.*"):
        shutil.copy(path, album.parent / "x" / path.name)
    assert "belongs to other vectors" in complaint(InputError, lambda: Store(album.parent / "x", verify=True))
    bb.embed(album, f"{album.parent}/x/", **OPTIONS)
    np.testing.assert_allclose(rows(album.parent / "x"), plain(bb, album), atol=1e-6)


@pytest.mark.parametrize("out", ["x/", "x.npy", "x.parquet"])
@pytest.mark.parametrize("same", [True, False], ids=["same settings", "others"])
def test_an_overwriting_run_that_was_killed_goes_on(
    out: str, same: bool, bb: Backbone, album: Path, stops: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run continues where it stopped, and the old file stays until the end; other settings start again."""
    out, mine = f"{album.parent}/{out}", OPTIONS | dict(overwrite=True)
    bb.embed(album, out, **OPTIONS | ({} if same else dict(pooling="mean")))
    old = Path(out).read_bytes() if not out.endswith("/") else None
    with monkeypatch.context() as killed:
        killed.setattr(write.Writer, "_stopped", lambda *_: None)
        stops(4, Stop)
        with pytest.raises(Stop):
            bb.embed(album, out, **mine)
    assert old is None or Path(out).read_bytes() == old
    if same:
        with monkeypatch.context() as killed:
            killed.setattr(write.Writer, "_stopped", lambda *_: None)
            stops(1, Stop)
            with pytest.raises(Stop):  # without overwrite it also continues, and does not use the old file
                bb.embed(album, out, **OPTIONS)
    assert bb.embed(album, out, **mine).resumed == 4
    np.testing.assert_allclose(rows(out), plain(bb, album), atol=1e-6)
    assert not Path(f"{out}.parts").exists() and bb.embed(album, out, **OPTIONS).resumed == COUNT
    assert bb.embed(album, out, **mine).resumed == 0, "once it is done, overwriting begins anew"


@pytest.mark.parametrize("moment", ["clearing", "joined", "half moved", "after"])
def test_a_kill_between_two_renames(moment: str, bb: Backbone, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill happens while a folder is cleared, or while a joined file is moved into place."""
    from dinov3_infer.features.disk.target import Target

    out = album.parent / ("x" if moment == "clearing" else "x.npy")
    given = f"{out}/" if moment == "clearing" else out
    if moment == "clearing":
        bb.embed(album, given, **OPTIONS | dict(pooling="mean"))
    with monkeypatch.context() as killed:
        if moment == "clearing":
            killed.setattr(Target, "clear", lambda *_, **__: (_ for _ in ()).throw(Stop()))
        elif moment == "joined":
            killed.setattr(Target, "settle", lambda *_: (_ for _ in ()).throw(Stop()))
        else:
            replace = os.replace

            def half(a: Any, b: Any) -> None:
                if Path(b).name == ("x.json" if moment == "half moved" else "x.npy"):
                    if moment == "after":
                        replace(a, b)
                    raise Stop
                replace(a, b)

            killed.setattr("dinov3_infer.features.disk.target.os.replace", half)
        killed.setattr(Target, "abandon", lambda *_: None)
        with pytest.raises(Stop):
            bb.embed(album, given, **OPTIONS | (dict(overwrite=True) if moment == "clearing" else {}))
    report = bb.embed(album, given, **OPTIONS | (dict(overwrite=True) if moment == "clearing" else {}))
    assert report.resumed == (0 if moment == "clearing" else COUNT)
    np.testing.assert_allclose(rows(out), plain(bb, album), atol=1e-6)
    assert not Path(f"{out}.parts").exists()


# --- told to stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_what_has_come_is_kept(
    out: str, at: int, bb: Backbone, album: Path, stops: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Passes of an incomplete shard are kept; the message counts images, and the result is that of one run."""
    bb.embed(album, f"{album.parent}/alone{out[1:]}", **OPTIONS)
    out = f"{album.parent}/{out}"
    stops(at)
    with pytest.raises(KeyboardInterrupt):
        bb.embed(album, out, **OPTIONS)
    kept = 2 * (at - 1)
    assert (f"{kept} of {COUNT} images are kept" in caplog.text) is (kept > 0)
    with pytest.raises((InputError, FileNotFoundError)):
        Store(out)
    stops(2 if at == 4 else 1)  # and once more
    with pytest.raises(KeyboardInterrupt):
        bb.embed(album, out, **OPTIONS)
    assert bb.embed(album, out, **OPTIONS).resumed == (kept + 2 if at == 4 else kept)
    mine, alone = ({p.name.replace("alone", "x"): p.read_bytes() for p in files(o)}
                   for o in (out, f"{album.parent}/alone{out.removeprefix(f'{album.parent}/')[1:]}"))  # fmt: skip
    assert mine == alone


def test_it_is_written_every_few_minutes(
    bb: Backbone, album: Path, stops: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill without a signal handler loses only the rows since the last write."""
    monkeypatch.setattr(write, "SECONDS", 0.0)
    monkeypatch.setattr(write.Writer, "_stopped", lambda *_: None)
    options = OPTIONS | dict(shard_size=9)
    stops(4, Stop)
    with pytest.raises(Stop):
        bb.embed(album, f"{album.parent}/x/", **options)
    parts = sorted(path.name for path in (album.parent / "x").glob("*.npy"))
    assert parts == ["000000+000000.npy", "000000+000002.npy", "000000+000004.npy"]
    (album.parent / "x" / "000000+000002.npy").write_bytes(b"")
    assert bb.embed(album, f"{album.parent}/x/", **options).resumed == 2, "up to the first damaged part"
    assert sorted(path.name for path in (album.parent / "x").glob("*.npy")) == ["000000.npy", "000001.npy"]
    np.testing.assert_allclose(rows(album.parent / "x"), plain(bb, album), atol=1e-6)


def test_a_stop_while_rows_are_patched(bb: Backbone, album: Path, stops: Callable[..., None]) -> None:
    out = album.parent / "x.npy"
    bb.embed(album, out, **OPTIONS)
    fill(album, 30)
    stops(4)
    with pytest.raises(KeyboardInterrupt):
        bb.embed(album, out, **OPTIONS)
    report = bb.embed(album, out, **OPTIONS)
    assert (report.resumed, report.changed) == (6, 4)
    np.testing.assert_allclose(rows(out), plain(bb, album), atol=1e-6)


# --- two writers ----------------------------------------------------------------------------------------------------


def _hold(folder: Path, run: str | None, ready: Any, done: Any) -> None:
    with locked(folder, folder, run):
        ready.set()
        done.wait(30)


@pytest.mark.skipif(os.name == "nt", reason="locks")
@pytest.mark.parametrize("mine, theirs, refused", [
    (None, None, True), ("a", None, True), (None, "a", True), ("a", "b", True), ("a", "a", False),
])  # fmt: skip
def test_one_run_is_inside(mine: str | None, theirs: str | None, refused: bool, tmp_path: Path) -> None:
    """The processes of one run share a folder; a lock ends with its process, even if that was killed."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "x", theirs, ready, done))
    process.start()
    assert ready.wait(60)
    if refused:
        with pytest.raises(InputError, match="another run is writing to 'v'"), locked(tmp_path / "x", "v", mine):
            pass
    else:
        with locked(tmp_path / "x", "v", mine):
            pass
        with pytest.raises(InputError), locked(tmp_path / "x", "v"):  # the other one is still inside
            pass
    process.kill()
    process.join()
    with locked(tmp_path / "x", "v", mine):
        pass
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="locks")
@pytest.mark.parametrize("out", ["x/", "x.npy"])
def test_another_run_into_the_same_output_is_refused(out: str, bb: Backbone, album: Path) -> None:
    out = f"{album.parent}/{out}"
    with locked(Path(out if out.endswith("/") else f"{out}.parts"), out):
        assert "another run is writing" in complaint(InputError, lambda: bb.embed(album, out, **OPTIONS))
    bb.embed(album, out, **OPTIONS)
