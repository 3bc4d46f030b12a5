"""Every public call in a typed program; `mypy --strict` and pyright check it, and it runs on nano."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import dinov3_infer
from dinov3_infer import (
    Backbone,
    BackboneOutput,
    Dinov3Error,
    EmbedReport,
    Features,
    InputError,
    Store,
    ViTConfig,
    list_images,
    list_models,
    load_image,
)
from dinov3_infer.tasks import (
    KNN,
    AttentiveProbe,
    LinearProbe,
    LogisticProbe,
    OneShotSegmenter,
    Probe,
    Pyramid,
    SegmentationHead,
    attention_picture,
    dense_features,
    duplicates,
    explore,
    foreground,
    nearest,
    overlay,
    pca_picture,
    pca_rgb,
    region_vector,
    search,
    similarity_map,
    similarity_picture,
)


def features(bb: Backbone, image: Image.Image) -> Features:
    f = bb.extract_features([image, image], size=64, layers=[0, -1], pooling="cls_mean")
    tensors: list[Tensor] = [f.embedding, f.cls_token, f.register_tokens, f.patch_tokens, f.feature_map]
    grid: tuple[int, int] = f.grid
    one: Features = f[0].normalize().to("cpu")
    row: int = f.to_patch(1.0, 2.0)[0] + grid[0] + len(tensors)
    maps: Tensor = f.layers[0].feature_map
    array: np.ndarray = np.asarray(one)
    arrays: dict[str, object] = f.numpy()
    print(row, maps.shape, array.shape, len(arrays), f.similarity(f), f == f, f.input_size, f.original_sizes)
    for each in bb.iter_features([image], size=64):
        print(each.grid)
    for found in bb.iter_features([image], size=64, on_error="return"):
        if isinstance(found, Dinov3Error):
            raise found
    return f


def network(bb: Backbone, image: Image.Image) -> None:
    pixels: Tensor = bb.preprocess([image, image])
    output: BackboneOutput = bb(pixels, layers=2)
    again: BackboneOutput = bb(pixel_values=pixels)
    attention: Tensor = bb.attention_maps(image, size=64, query=(3, 4))
    device: torch.device = bb.device
    dtype: torch.dtype = bb.dtype
    width: int = bb.embed_dim + bb.patch_size + bb.n_blocks
    text: str = bb.fingerprint()
    print(output.cls_token.shape, again.layers, attention.shape, device, dtype, width, text, bb.why_not_triton())


def disk(bb: Backbone, image: Image.Image, folder: Path) -> None:
    path = folder / "image.png"
    image.save(path)
    vectors: np.ndarray = bb.embed([path], size=64)
    report: EmbedReport = bb.embed([path, path], folder / "v.npy", size=64, normalize=True)
    store = Store(folder / "v.npy")
    cosines, numbers = search(store, vectors, 1)
    groups = duplicates(store, 0.9)
    names: list[str] = list_images(folder)
    pixels: Tensor = load_image(path)
    print(report.shape, cosines, numbers, groups.kept(store), names, pixels.shape, store.vectors().shape)
    saved: Path = bb.save_pretrained(folder / "saved")
    loaded: Backbone = Backbone.from_pretrained(saved, device="cpu", dtype=torch.float32, mode="plain")
    adopt: Callable[[torch.nn.Module], Backbone] = Backbone.adopt
    fresh: Backbone = Backbone.from_config(ViTConfig(64, 1, 2, 64), seed=0)
    print(loaded.info, adopt, fresh.summary(), explore(bb, [path], folder / "e.html", size=64).error)
    print(list_models(), dinov3_infer.__version__)


def tasks(bb: Backbone, image: Image.Image, f: Features, folder: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(40, bb.embed_dim)).astype(np.float32), ["cat", "dog"] * 20
    for probe in (KNN(k=3), LinearProbe(steps=3), LogisticProbe(C=1.0)):
        print(probe.fit(x, y).predict(x), probe.predict_proba(x), probe.score(x, y), probe.classes_)
    knn = KNN(k=3).fit(x, y)
    knn.save(folder / "probe.safetensors", bb, pooling="cls")
    again: Probe = Probe.load(folder / "probe.safetensors", bb)
    print(again, AttentiveProbe(epochs=1).fit(x[:, None], y), nearest(x, x, 2))
    single, mask = f[0], np.zeros((96, 128), bool)
    mask[20:60, 30:80] = True
    labels: list[Tensor] = OneShotSegmenter().fit(single, mask).predict(single)
    print(labels, SegmentationHead(steps=2).fit(single, mask).scores(single))
    pictures: list[Image.Image] = [
        pca_picture(image, single), similarity_picture(image, single, (10, 10)),
        attention_picture(image, bb.attention_maps(image, size=64)),
        overlay(image, similarity_map(single, region_vector(single, point=(10, 10)))[0], single.placements[0]),
    ]  # fmt: skip
    print(pictures, pca_rgb(f)[0].shape, foreground(f)[0].shape, dense_features(bb, image, size=128, tile=64).grid)
    print({name: maps.shape for name, maps in Pyramid(bb)(bb.preprocess([image])).items()})


def main() -> None:
    bb = Backbone.from_pretrained("nano", device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8))
    with tempfile.TemporaryDirectory() as scratch:
        network(bb, image)
        disk(bb, image, Path(scratch))
        tasks(bb, image, features(bb, image), Path(scratch))
    try:
        bb.extract_features("nothing.jpg")
    except (Dinov3Error, InputError) as error:
        print(error)


if __name__ == "__main__":
    main()
