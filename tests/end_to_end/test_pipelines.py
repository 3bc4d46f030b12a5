"""The transform and `embed` inside other libraries: torch's DataLoader, datasets, scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL
from pictures import photo
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dinov3_infer import Backbone
from dinov3_infer.images.preprocess import Preprocess


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return Backbone.from_config(SMALL["dinov3"], seed=0)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve images of different sizes, dark and bright in turn."""
    folder = tmp_path_factory.mktemp("album")
    for i in range(12):
        shades = photo(40 + i, 60 - i, seed=i) // 4 + (160 if i % 2 else 0)
        Image.fromarray(shades.astype(np.uint8)).save(folder / f"{i:02}.png")
    return sorted(map(str, folder.iterdir()))


class Album(Dataset[torch.Tensor]):
    """A Dataset as users write it."""

    def __init__(self, paths: list[str], transform: Preprocess) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_in_a_loader(num_workers: int, bb: Backbone, album: list[str]) -> None:
    """Workers return the pixels that `extract_features` computes itself."""
    transform = bb.preprocess.with_options(size=64)
    batches = list(DataLoader(Album(album, transform), batch_size=5, num_workers=num_workers))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert torch.equal(torch.cat(batches), transform.batch(album).pixels)
    with torch.no_grad():
        vectors = torch.cat([bb(batch).cls_token for batch in batches])
    found = torch.from_numpy(bb.embed(album, size=64))
    torch.testing.assert_close(found, vectors, rtol=0, atol=1e-5)  # the fast path rounds otherwise


@pytest.fixture(scope="module")
def rows(album: list[str]) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"image": album}).cast_column("image", datasets.Image())


@pytest.mark.peers
@pytest.mark.parametrize("workers", [None, 2])
def test_datasets_map(workers: int | None, bb: Backbone, album: list[str], rows: Any) -> None:
    """Covers a column of pixels, with several processes, and a column of vectors."""
    transform = bb.preprocess.with_options(size=32)
    mapped = rows.map(lambda row: {"pixels": transform(row["image"])}, num_proc=workers).with_format("torch")
    assert torch.equal(mapped["pixels"][:], transform.batch(album).pixels)
    embedded = rows.map(lambda batch: {"vector": bb.embed(batch["image"], size=32)}, batched=True, batch_size=5)
    assert np.array_equal(np.array(embedded["vector"][:], np.float32), bb.embed(album, size=32))


@pytest.mark.peers
def test_datasets_with_transform_and_columns(bb: Backbone, album: list[str], rows: Any) -> None:
    """Covers a transform on access, and a whole column as input."""
    transform = bb.preprocess.with_options(size=32)
    live = rows.with_transform(lambda batch: {"pixels": [transform(image) for image in batch["image"]]})
    assert torch.equal(live[3]["pixels"], transform(album[3]))
    assert np.array_equal(bb.embed(rows["image"], size=32), bb.embed(album, size=32))
    assert [f.grid for f in bb.iter_features(rows["image"], fit="native")][:2] == [(2, 4), (3, 4)]


@pytest.mark.peers
def test_a_pipeline_of_scikit_learn(bb: Backbone, album: list[str], tmp_path: Path) -> None:
    """Paths go in and classes come out, through `FunctionTransformer`; cross-validation clones the pipeline."""
    pytest.importorskip("sklearn", reason="needs pip install scikit-learn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    labels = [i % 2 for i in range(len(album))]
    embed = FunctionTransformer(bb.embed, kw_args=dict(size=64, pooling="cls_mean"))
    pipeline = make_pipeline(embed, StandardScaler(), LogisticRegression())
    assert pipeline.fit(album, labels).score(album, labels) == 1.0
    assert np.array_equal(pipeline[0].transform(album), bb.embed(album, size=64, pooling="cls_mean"))
    assert cross_val_score(pipeline, album, labels, cv=3).mean() == 1.0
