"""Other projects on a Backbone: what they compute, beside what they compute on a model of theirs with the same weights.

    python tests/benchmarks/other_projects.py sentence_transformers | anomalib | dinotool

Each in its own environment, with a CPU build of torch and the torchvision of that torch:

    pip install torch==2.13.0 . && pip install --no-deps "torchvision==0.28.*"
    pip install sentence-transformers

The result goes to records/other_projects.json, where those of the other projects stay.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np  # noqa: E402
from oracles import randomise  # noqa: E402
from PIL import Image  # noqa: E402

from dinov3_infer import Backbone  # noqa: E402
from dinov3_infer.cli.bench.repairs import mend_torchvision  # noqa: E402

RECORD = Path(__file__).parent / "records" / "other_projects.json"
CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"
FAMILIES = ("nano", "dinov3_vits16", "dinov2_vits14", "dinov2_vits14_reg", "dino_vits16", "dinov3_convnext_tiny")


def images() -> list[Image.Image]:
    """A photograph and five parts of it, of several shapes."""
    cat = Image.open(CAT).convert("RGB")
    return [cat, *(cat.crop((40 * i, 10 * i, 40 * i + 200 + 20 * i, 10 * i + 240)) for i in range(5))]


def model(name: str) -> Backbone:
    """`nano`, or a model with random weights."""
    if name == "nano":
        return Backbone.from_pretrained("nano", device="cpu")
    bb = Backbone.from_config(name)
    randomise(bb)
    return bb


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the rows of two arrays [N, C]."""
    products = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(products.min())


def sentence_transformers(families: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    """The least cosine of a vector of ours with that of a saved folder; and without the files for it."""
    from sentence_transformers import SentenceTransformer

    rows = {}
    for name in families:
        bb = model(name)
        ours = bb.embed(images())
        with tempfile.TemporaryDirectory() as scratch:
            folder = bb.save_pretrained(Path(scratch) / "model")
            encoder = SentenceTransformer(str(folder), device="cpu")
            found = encoder.encode(images(), batch_size=2)
            assert encoder.get_embedding_dimension() == bb.embed_dim == found.shape[1]
            (folder / "modules.json").unlink()
            bare = SentenceTransformer(str(folder), device="cpu").encode(images(), batch_size=2)
        rows[name] = {
            "least_cosine": least_cosine(ours, found),
            "least_cosine_without_the_files": least_cosine(ours, bare),
        }
    return {"packages": ["sentence-transformers", "transformers"], "models": rows}


PROJECTS = {"sentence_transformers": sentence_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", choices=PROJECTS)
    args = parser.parse_args()
    mend_torchvision()
    found = PROJECTS[args.project]()
    packages = ("torch", "torchvision", *found.pop("packages"))
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    record[args.project] = {"versions": versions, **found}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(record[args.project], indent=1))


if __name__ == "__main__":
    main()
