"""`embed` to files: complete shards, compared records, and runs that continue."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint, photo
from PIL import Image
from repository import ROOT, benchmarks_importable
from safetensors import safe_open

from dinov3_infer import Backbone, InputError
from dinov3_infer.features.disk import write as run
from dinov3_infer.features.disk.formats import FORMATS
from dinov3_infer.features.disk.store import Store
from dinov3_infer.features.extractor import Extractor

SIZES = [(64, 64), (64, 96), (50, 70), (33, 120), (20, 20), (64, 64), (90, 30)]


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return randomise(Backbone.from_config(SMALL["dinov3"]))  # type: ignore[return-value]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of seven images, the fourth truncated."""
    folder = tmp_path / "album"
    folder.mkdir()
    for i, size in enumerate(SIZES):
        Image.fromarray(photo(*size, seed=i)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    return folder


def listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def without_seal(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("first", "rows", "files")}


def needs(suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", ["embedding", "patches", "map"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_format_holds_the_same(suffix: str, kind: Any, dtype: Any, bb: Backbone, album: Path) -> None:
    """File and folder hold the rows of the array, and path, grid and error of each row."""
    needs(suffix)
    form = FORMATS[suffix]()
    options: dict[str, Any] = dict(size=64, kind=kind, out_dtype=dtype, on_error="skip")
    expected = bb.embed(album, **options)
    assert expected.dtype == dtype
    report = bb.embed(album, album.parent / f"x{suffix}", shard_size=3, **options)
    assert report.shape == expected.shape and [f.row for f in report.failures] == [3] and report.resumed == 0
    found = form.vectors(report.path)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    assert [(line.path, bool(line.error)) for line in form.lines(report.path)] == [
        (str(album / f"{i}.png"), i == 3) for i in range(7)
    ]
    assert not (album.parent / f"x{suffix}.parts").exists()
    bb.embed(album, f"{album.parent}/y{suffix}/", shard_size=3, **options)
    files = sorted((album.parent / f"y{suffix}").glob(f"*{suffix}"))
    assert [path.name for path in files] == [f"00000{i}{suffix}" for i in range(3)]
    parts = np.concatenate([form.vectors(path) for path in files])
    np.testing.assert_array_equal(parts.reshape(expected.shape), expected)


def test_others_read_it(bb: Backbone, album: Path) -> None:
    """Other libraries read the files, and the files hold their record."""
    options: dict[str, Any] = dict(size=64, on_error="skip")
    rows = bb.embed(album, **options)
    bb.embed(album, album.parent / "x.safetensors", **options)
    with safe_open(album.parent / "x.safetensors", "np") as content:
        np.testing.assert_array_equal(content.get_tensor("embedding"), rows)
        recipe = json.loads(content.metadata()["dinov3_infer"])
    assert recipe["fingerprint"] == bb.fingerprint() and recipe["count"] == 7 and recipe["pooling"] == "cls"
    assert "x.jsonl' exists already" in complaint(
        InputError, lambda: bb.embed(album, album.parent / "x.npy", **options)
    )
    bb.embed(album, album.parent / "y.npy", **options)
    assert np.load(album.parent / "y.npy").flags["C_CONTIGUOUS"]
    assert without_seal(json.loads((album.parent / "y.json").read_text())) == without_seal(recipe)
    assert [line["grid"] for line in listed(album.parent / "y.jsonl")] == [[4, 4]] * 3 + [None] + [[4, 4]] * 3
    pa = pytest.importorskip("pyarrow.parquet")
    bb.embed(album, album.parent / "x.parquet", **options)
    table = pa.read_table(album.parent / "x.parquet")
    assert table.column_names == ["path", "embedding", "grid", "error", "source"]
    assert [bool(error) for error in table.column("error").to_pylist()] == [i == 3 for i in range(7)]
    assert table.column("error").null_count == 6
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert str(table.schema.field("grid").type).startswith("list<")  # pyarrow before 24 reads no null in the other kind
    assert without_seal(json.loads(table.schema.metadata[b"dinov3_infer"])) == without_seal(recipe)


def test_maps_of_unequal_shape_go_to_parquet(bb: Backbone, album: Path) -> None:
    """Parquet stores the grid that restores the shape; other formats are refused before an image is read."""
    text = complaint(InputError, lambda: bb.embed(album, album.parent / "x.npy", kind="map", fit="native"))
    assert "write .parquet" in text
    pa = pytest.importorskip("pyarrow.parquet")
    bb.embed(album, album.parent / "x.parquet", kind="map", fit="native", on_error="skip", shard_size=2)
    table = pa.read_table(album.parent / "x.parquet").to_pylist()
    assert table[3]["grid"] is None and table[3]["embedding"] == []
    for i in (1, 6):
        expected = bb.extract_features(album / f"{i}.png", fit="native").feature_map[0].numpy()
        assert tuple(table[i]["grid"]) == expected.shape[1:]
        np.testing.assert_array_equal(np.float32(table[i]["embedding"]).reshape(expected.shape), expected)


@pytest.mark.parametrize("out", ["x.npy", "x/"])
def test_streams_and_nothing(out: str, bb: Backbone, tmp_path: Path) -> None:
    """A stream is written as it comes and cannot be continued; an empty input gives no rows."""
    pictures = [photo(32, 32, seed=i) for i in range(7)]
    report = bb.embed(iter(pictures), f"{tmp_path}/{out}", size=32, shard_size=3)
    assert report.shape == (7, 64) and report.failures == ()
    found = np.concatenate([block for _, block in Store(tmp_path / out).blocks()])
    np.testing.assert_allclose(found, bb.embed(pictures, size=32, normalize=True), atol=1e-6)
    text = complaint(InputError, lambda: bb.embed(iter(pictures), f"{tmp_path}/{out}", size=32))
    assert "in-memory images or a stream" in text
    assert bb.embed([], tmp_path / "none.npy").shape == (0, 64)
    assert np.load(tmp_path / "none.npy").shape == (0, 64)


# --- continuing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["x/", "x.npy"])
def test_a_rerun_adds_what_is_missing(out: str, bb: Backbone, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in the third shard two are complete; the same call writes only the third, with the same bytes."""
    target, options = f"{album.parent}/{out}", dict(size=64, shard_size=2, batch_size=2, on_error="skip")
    bb.embed(album, f"{album.parent}/alone{out[1:]}", **options)  # type: ignore[call-overload]
    launched, calls = Extractor.launched, []

    def stops(self: Extractor, batches: list[Any], *args: Any, **more: Any) -> Any:
        calls.append(len(batches[0].pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return launched(self, batches, *args, **more)

    monkeypatch.setattr(Extractor, "launched", stops)
    with pytest.raises(KeyboardInterrupt):
        bb.embed(album, target, **options)  # type: ignore[call-overload]
    calls.append(0)
    report = bb.embed(album, target, **options)  # type: ignore[call-overload]
    assert calls[4:] == [2, 1] and report.resumed == 3 and report.retried == 1, "the one that failed is tried again"
    assert [f.row for f in report.failures] == [3]
    if out == "x/":
        assert snapshot(album.parent / "x") == snapshot(album.parent / "alone")
    else:
        assert np.array_equal(np.load(target), np.load(album.parent / "alone.npy"), equal_nan=True)
        assert not Path(f"{target}.parts").exists()
    again = bb.embed(album, target, **options)  # type: ignore[call-overload]
    assert again.resumed == 6 and again.shape == report.shape and calls[4:] == [2, 1]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(size=32), "with preprocess.size 64, not 32"), (dict(pooling="mean"), 'with pooling "cls", not "mean"'),
        (dict(normalize=True), "with normalize false, not true"), (dict(decode="fast"), 'decode "exact", not "fast"'),
        (dict(out_dtype="float16"), 'out_dtype "float32", not "float16"'),
        (dict(shard_size=5), "plan.shard_size 3, not 5"),
        (dict(batch_size=9), "plan.batch_size"), ("model", "with fingerprint "), ("pictures", "from other images"),
        ("more pictures", "with count 7, not 8"), ("rope", "with architecture.rope_periods"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.split()[0],
)  # fmt: skip
@pytest.mark.parametrize("out", ["x/", "x.npy"])
def test_what_does_not_match_is_refused(change: Any, said: str, out: str, bb: Backbone, album: Path) -> None:
    """One sentence names the difference; the files do not change, and overwriting is possible."""
    options: dict[str, Any] = dict(size=64, shard_size=3, on_error="skip")
    target = f"{album.parent}/{out}"
    bb.embed(album, target, **options)
    folder = album.parent / "x" if out == "x/" else album.parent
    before = snapshot(folder)
    model = bb
    if isinstance(change, dict):
        options |= change
    elif change == "model":
        model = randomise(Backbone.from_config(SMALL["dinov3"]), 7)  # type: ignore[assignment,call-arg]
    elif change == "rope":
        model = Backbone.from_config(SMALL["dinov3"])
        model.load_state_dict(bb.state_dict())
        model.rope_periods.mul_(1.001)  # type: ignore[union-attr]
    elif change == "pictures":
        (album / "6.png").rename(album / "7.png")
    else:
        Image.fromarray(photo(9, 9)).save(album / "9.png")
    text = complaint(InputError, lambda: model.embed(album, target, **options))
    assert said in text and "exists already and was made" in text
    assert snapshot(folder) == before
    assert model.embed(album, target, overwrite=True, **options).resumed == 0


def test_memory_that_does_not_do_begins_the_shard_again(
    bb: Backbone, album: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The shard starts again with half the batch size, which is recorded; results depend on nothing else."""
    forward, sizes = bb.forward, []

    def tight(pixels: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(pixels))
        if len(pixels) == 4 and len(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pixels, *args, **options)

    monkeypatch.setattr(bb, "forward", tight)
    (album / "3.png").unlink()
    report = bb.embed([*sorted(album.iterdir()), *sorted(album.iterdir())], f"{album.parent}/x.safetensors/",
                      size=64, batch_size=4, shard_size=6)  # fmt: skip
    assert sizes == [4, 2, 4, 2, 2, 2] and report.batch_size == 2
    assert [r.getMessage() for r in caplog.records] == ["out of memory; continuing with 2 images per pass"]
    recorded = []
    for i in range(2):
        shard = album.parent / "x.safetensors" / f"00000{i}.safetensors"
        assert shard.stat().st_mode == (album / "2.png").stat().st_mode
        with safe_open(shard, "np") as content:
            recorded.append(json.loads(content.metadata()["dinov3_infer"])["plan"]["batch_size"])
    assert recorded == [4, 2]


def test_the_batch_size_is_found_by_trying() -> None:
    """The fastest size per image wins; the search ends at the memory limit, without gain, or at the time limit."""
    now = [0.0]

    def trial(seconds: Callable[[int], float], most: int = 64, limit: float = 1e9) -> int:
        def work(size: int) -> None:
            if size > 32:
                raise torch.OutOfMemoryError
            now[0] += seconds(size)

        return run.best_batch_size(work, most, limit, lambda: now[0])

    assert trial(lambda n: 1 + 0.01 * n) == 32  # the memory limit ends the search
    assert trial(lambda n: n) == 1  # larger batches gain nothing
    assert trial(lambda n: 1 + n / 4) == 32 and trial(lambda n: 1 + n / 4, most=8) == 8
    assert trial(lambda n: 10.0, limit=15.0) == 1


# --- several processes, and signals ---------------------------------------------------------------------------------


def test_processes_share_the_shards(bb: Backbone, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun, but one after the other: each shard is written once, with the bytes of a single process."""
    options: dict[str, Any] = dict(size=64, shard_size=2, on_error="skip")
    bb.embed(album, f"{album.parent}/alone/", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        counts.append(bb.embed(album, f"{album.parent}/x/", **options).shape[0])
    assert counts == [4, 3] and snapshot(album.parent / "x") == snapshot(album.parent / "alone")
    assert "a name without suffix" in complaint(InputError, lambda: bb.embed(album, album.parent / "x.npy", **options))


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_signals_end_a_run_cleanly(number: int, status: int, album: Path, tmp_path: Path) -> None:
    """Complete shards stay, no partial file is left, and the exit status names the signal."""
    script = f"""
import os, signal, sys, torch
from dinov3_infer import Backbone, VisionTransformer
from dinov3_infer.cli import main
forward, calls = VisionTransformer.forward, []
def slow(self, pixels, *args, **options):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), {int(number)})
    return forward(self, pixels, *args, **options)
VisionTransformer.forward = slow
Backbone.from_config("nano", seed=0).save_pretrained({str(tmp_path / "nano")!r})
sys.exit(main(["embed", {str(album)!r}, "-o", {str(tmp_path / "x")!r}, "-m", {str(tmp_path / "nano")!r}, "--device",
               "cpu", "--size", "32", "--shard-size", "2", "-b", "2"]))
"""
    root = ROOT
    paths = os.pathsep.join((str(root), str(root / "kernels")))
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert ran.returncode == status, ran.stderr
    assert "4 of 7 images are kept; the same call continues from there" in ran.stderr and "Traceback" not in ran.stderr
    assert sorted(os.listdir(tmp_path / "x")) == [
        "000000.json", "000000.jsonl", "000000.npy", "000001.json", "000001.jsonl", "000001.npy", "dinov3_infer.json",
    ]  # fmt: skip


def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    """A small version of tests/benchmarks/embed_kill.py."""
    with benchmarks_importable():
        import embed_kill
        from albums import write_album
    weights = Backbone.from_config("nano", seed=0).save_pretrained(tmp_path / "nano")
    paths = write_album(tmp_path / "album", 150, share_broken=1 / 3)
    record = embed_kill.experiment(
        weights,
        tmp_path / "album",
        paths,
        tmp_path,
        ".npy",
        2,
        6,
        0,
        "--size",
        "32",
        "-j",
        "0",
        "-b",
        "4",
        at_most=0.02,
        others=3,
    )
    assert record["equal"] and record["every_input_once"] and not record["left_behind"]
    assert record["failed"] == 50 and min(record["new_shards_before_each_kill"]) >= 1
