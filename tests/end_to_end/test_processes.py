"""Several processes, by torchrun and by a real Ray cluster on this machine, compared with one process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import small_model, write_pictures
from pictures import complaint
from repository import ROOT

from dinov3_infer import Backbone, InputError
from dinov3_infer.features.disk import recipe
from dinov3_infer.features.disk.store import Store
from dinov3_infer.features.disk.target import Target
from dinov3_infer.features.vectors import EmbedOptions
from dinov3_infer.images.opening import open_images
from dinov3_infer.ray import Embedder, _Shards, check_cluster, embed_dataset

OPTIONS: dict[str, Any] = dict(size=32, on_error="skip", shard_size=3)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Ten images of many sizes, one of them broken."""
    return write_pictures(tmp_path / "album", *(f"{i}.png" for i in range(9)), "broken.png")


def contents(path: Path) -> dict[str, tuple[bytes, bool]]:
    store = Store(path)
    vectors = np.concatenate([block for _, block in store.blocks()])
    return {name: (v.tobytes(), bool(good)) for name, v, good in zip(store.paths, vectors, store.good, strict=True)}


@pytest.mark.parametrize(
    "actors, num_cpus, num_gpus, total, said",
    [
        (2, 1, 0, {"CPU": 2.0}, "each take 2 of the cluster's 2 CPUs"), (1, 1, 0, {"CPU": 1.0}, "num_cpus=0"),
        (2, 0.25, 1, {"CPU": 8.0, "GPU": 1.0}, "2 actors with 1 GPUs each need 2 GPUs, and the cluster has 1"),
        (2, 0.5, 0, {"CPU": 2.0}, None), (8, 0.5, 1, {"CPU": 5.0, "GPU": 8.0}, None),
    ],
)  # fmt: skip
def test_actors_leave_room_for_reading_and_writing(
    actors: int, num_cpus: float, num_gpus: float, total: dict[str, float], said: str | None
) -> None:
    """The error comes before the start; Ray itself would wait without a message."""
    if said is None:
        check_cluster(actors, num_cpus, num_gpus, total)
    else:
        assert said in complaint(InputError, lambda: check_cluster(actors, num_cpus, num_gpus, total))


def test_an_embedder_takes_what_ray_gives(album: Path) -> None:
    """Takes bytes, arrays or paths; removes the images, keeps other columns, and gives an error for a broken image."""
    pytest.importorskip("pyarrow")
    embedder = Embedder(small_model(), device="cpu", size=32)
    paths = sorted(str(path) for path in album.iterdir())
    contents = np.array([Path(path).read_bytes() for path in paths], object)
    expected = Backbone.from_pretrained(small_model(), device="cpu").embed(paths, size=32, on_error="skip")
    for batch in ({"path": np.array(paths)}, {"bytes": contents, "path": np.array(paths), "label": np.arange(10)}):
        table = embedder(batch)
        assert set(table.column_names) == {*batch, "embedding", "grid", "error"} - {"bytes"}
        found = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(10, -1)
        np.testing.assert_array_equal(found, expected)
        assert [bool(e) for e in table.column("error").to_pylist()] == [False] * 9 + [True]
    assert "got label" in complaint(InputError, lambda: embedder({"label": np.arange(3)}))


def test_an_actor_hashes_weights_and_names_once(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hash serves many shards; the shards equal those of one process, which can continue the folder."""
    hashed: list[str] = []
    for name in ("fingerprint", "digest"):
        whole = getattr(recipe, name)
        monkeypatch.setattr(recipe, name, lambda *given, name=name, whole=whole: hashed.append(name) or whole(*given))
    asked = EmbedOptions(size=32, shard_size=3)
    source, target = open_images(album), Target.find(f"{tmp_path}/x/")
    actor = _Shards(str(small_model()), source, target, asked, "cpu", "auto")  # type: ignore[arg-type]
    for shards in ([2, 0], [3], [1]):
        actor({"shard": shards})
    assert sorted(hashed) == ["digest", "fingerprint"]
    Backbone.from_pretrained(small_model(), device="cpu").embed(album, f"{tmp_path}/alone/", **OPTIONS)
    assert contents(tmp_path / "x") == contents(tmp_path / "alone")
    assert Backbone.from_pretrained(small_model(), device="cpu").embed(album, f"{tmp_path}/x/", **OPTIONS).resumed == 9


@pytest.mark.slow
def test_torchrun(album: Path, tmp_path: Path) -> None:
    """One of two processes was killed; a rerun adds the missing shards, and the bytes are those of one process."""
    command = ["embed", album, "-o", f"{tmp_path}/x/", "-m", small_model(), "--device", "cpu", "--size", "32"]
    command += ["--shard-size", "3"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dinov3_infer",
    ]
    for _ in range(2):
        ran = subprocess.run([*launch, *map(str, command)], env=environment, capture_output=True, text=True)
        assert "Traceback" not in ran.stderr.split("torch.distributed")[0], ran.stderr
        Backbone.from_pretrained(small_model(), device="cpu").embed(album, f"{tmp_path}/alone/", **OPTIONS)
        assert contents(tmp_path / "x") == contents(tmp_path / "alone")
        (tmp_path / "x" / "000002.npy").unlink()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    monkeypatch.setenv("RAY_DISABLE_METRICS_COLLECTION", "1")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray(cluster: Any, album: Path, tmp_path: Path) -> None:
    """Two actors write the folder of one process; a rerun adds missing shards and refuses other settings."""
    Backbone.from_pretrained(small_model(), device="cpu").embed(album, f"{tmp_path}/alone/", **OPTIONS)
    given: dict[str, Any] = dict(actors=2, shard_size=3, size=32, device="cpu")
    assert embed_dataset(album, tmp_path / "x", small_model(), **given) == 4
    assert contents(tmp_path / "x") == contents(tmp_path / "alone")
    (tmp_path / "x" / "000001.npy").unlink()
    assert embed_dataset(album, tmp_path / "x", small_model(), **given) == 1
    assert contents(tmp_path / "x") == contents(tmp_path / "alone")
    assert embed_dataset(album, tmp_path / "x", small_model(), **given) == 0
    (tmp_path / "x" / "000001.npy").unlink()
    with pytest.raises(Exception, match="was made with pooling"):
        embed_dataset(album, tmp_path / "x", small_model(), **given | {"pooling": "mean"})
    text = complaint(InputError, lambda: embed_dataset(album, tmp_path / "y", small_model(), actors=3, num_cpus=1))
    assert "must stay free" in text
    rows = cluster.data.read_binary_files(str(album), include_paths=True, file_extensions=["png"]).map_batches(
        Embedder, fn_constructor_kwargs=dict(model=str(small_model()), device="cpu", size=32), batch_size=4,
        num_cpus=0.5, compute=cluster.data.ActorPoolStrategy(size=1),
    )  # fmt: skip
    found = {row["path"]: row for row in rows.take_all()}
    expected = Backbone.from_pretrained(small_model(), device="cpu").embed(album, size=32, on_error="skip")
    for i, path in enumerate(sorted(album.iterdir())):
        np.testing.assert_allclose(found[str(path)]["embedding"], expected[i], rtol=1e-6)
        assert bool(found[str(path)]["error"]) is (path.name == "broken.png")
