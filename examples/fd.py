"""The Fréchet distance between the embeddings of two sets of images, a measure for image generators.

    python examples/fd.py REAL FAKE --model dinov2_vits14

REAL and FAKE are folders, patterns, or files that `dinov3-infer embed` wrote.  The distance is that of two Gaussians
with the means and covariances of the embeddings.  It needs thousands of images, and it depends on the model, the size
and the number of images: compare only distances with the same settings.

Source: Heusel et al. (arXiv 1706.08500), section 3; with DINOv2 instead of Inception: Stein et al. (2306.04675).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import MODEL, load, log, run
from torch import Tensor

from dinov3_infer import Backbone, InputError, Store


def moments(vectors: Tensor) -> tuple[Tensor, Tensor]:  # [N, C] float64
    """Mean [C] and covariance [C, C] of vectors [N, C].  Raises: InputError for fewer than 2 vectors."""
    if len(vectors) < 2:
        raise InputError(f"a covariance needs at least 2 images, got {len(vectors)}; give more")
    return vectors.mean(dim=0), torch.cov(vectors.T).reshape(vectors.shape[1], vectors.shape[1])


def frechet(real: Tensor, fake: Tensor) -> float:  # [N, C], [M, C] float64
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), [].  Raises: InputError for embeddings of different length."""
    if real.shape[1] != fake.shape[1]:
        raise InputError(f"embeddings of length {real.shape[1]} and {fake.shape[1]} cannot be compared; use one model")
    (m1, s1), (m2, s2) = moments(real), moments(fake)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S1 S2 has the eigenvalues of root S2 root
    crossed = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * crossed)


def vectors_of(source: str, model: Backbone | None, size: int) -> Tensor:
    """The embeddings [N, C] of images, computed or stored, without images that could not be read."""
    if model is None:
        log.info("reading the embeddings at %s", source)
        store = Store(source)
        found = store.vectors()[store.good]
    else:
        log.info("embedding the images of %s", source)
        found = model.embed(source, size=size - size % model.patch_size, on_error="skip", progress=None)
        found = found[np.isfinite(found).all(axis=1)]
    return torch.from_numpy(found).double()


def stored(source: str) -> bool:
    """Whether `source` is a file or folder that embed wrote."""
    path = Path(source)
    return path.suffix in (".npy", ".safetensors", ".parquet") or (path / "dinov3_infer.json").is_file()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("real", metavar="REAL")
    options.add_argument("fake", metavar="FAKE")
    options.add_argument("--model", default=MODEL, help="name, hub id, folder or weights file (default: %(default)s)")
    options.add_argument(
        "--size", type=int, default=224, help="side of the model input in pixels (default: %(default)s)"
    )
    args = options.parse_args()
    kept = [stored(source) for source in (args.real, args.fake)]
    if all(kept):
        Store(args.real).check_comparable(Store(args.fake))
    elif any(kept):
        raise InputError("REAL and FAKE are of two kinds; give two folders of images, or two files that embed wrote")
    model = None if all(kept) else load(args)
    real, fake = (vectors_of(source, model, args.size) for source in (args.real, args.fake))
    print(f"{frechet(real, fake):.4f}  {len(real):,} and {len(fake):,} images, {real.shape[1]} numbers each")


if __name__ == "__main__":
    run(main)
