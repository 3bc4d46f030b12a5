"""Other projects on a Backbone: what they compute, beside what they compute on a model of theirs with the same weights.

    python tests/benchmarks/other_projects.py sentence_transformers | anomalib | dinotool

Each in its own environment, with a CPU build of torch and the torchvision of that torch:

    pip install torch==2.13.0 . && pip install --no-deps "torchvision==0.28.*"
    pip install pytest sentence-transformers    # or: pytest timm anomalib; or: pytest dinotool

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
import torch  # noqa: E402
from oracles import randomise  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dinov3_infer import Backbone  # noqa: E402
from dinov3_infer.cli.bench.repairs import mend_torchvision  # noqa: E402

RECORD = Path(__file__).parent / "records" / "other_projects.json"
CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"
FAMILIES = ("nano", "dinov3_vits16", "dinov2_vits14", "dinov2_vits14_reg", "dino_vits16", "dinov3_convnext_tiny")
TIMM = ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb")


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


def register(name: str, made: nn.Module) -> None:
    """Makes `timm.create_model(name)` return this module."""
    from timm.models import register_model

    def build(pretrained: bool = False, **_: Any) -> nn.Module:
        return made

    build.__name__ = name
    register_model(build)


def pixels() -> tuple[Tensor, Tensor]:
    """Parts of a photograph, [8, 3, 224, 224] normalised, and one with and one without a dark square, [2, 3, ...]."""
    cat = np.asarray(Image.open(CAT).convert("RGB"), np.float32) / 255
    parts = torch.stack([torch.from_numpy(cat[4 * i : 4 * i + 224, 20 * i : 20 * i + 224]) for i in range(10)])
    parts = (parts.permute(0, 3, 1, 2) - 0.45) / 0.225
    parts[9, :, 80:140, 80:140] = -2
    return parts[:8].contiguous(), parts[8:].contiguous()


def anomaly_dino(name: str) -> Any:
    from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel

    made, (good, asked) = AnomalyDINOModel(encoder_name=name), pixels()
    made.train()(good)
    made.fit()
    return made.eval()(asked)


def dinomaly(name: str) -> Any:
    from anomalib.models.image.dinomaly.torch_model import DinomalyModel

    torch.manual_seed(0)
    made, (good, asked) = DinomalyModel(encoder_name=name).train(), pixels()
    optimizer = torch.optim.AdamW([*made.bottleneck.parameters(), *made.decoder.parameters()], lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        made(good, global_step=step).backward()
        optimizer.step()
    with torch.no_grad():
        return made.eval()(asked)


def patchcore(name: str) -> Any:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.manual_seed(0)
    np.random.seed(0)  # of the projection that chooses the memory bank
    made, (good, asked) = PatchcoreModel(layers=["blocks.5", "blocks.8"], backbone=name), pixels()
    made.train()(good)
    made.subsample_embedding(0.1)
    return made.eval()(asked)


def anomalib(names: tuple[str, ...] = TIMM) -> dict[str, Any]:
    """What three methods give on a Backbone, and on timm's model with the same random weights, by `create_model`."""
    import timm

    rows: dict[str, Any] = {}
    for name in names:
        # positions of the size of the images, because anomalib changes how timm resizes them
        theirs = randomise(timm.create_model(name, **({"img_size": 224} if "dinov2" in name else {})))
        register(f"{name}_theirs", theirs)
        register(f"{name}_ours", Backbone.adopt(theirs))
        for method in (anomaly_dino, dinomaly, patchcore):
            one, other = method(f"{name}_theirs"), method(f"{name}_ours")
            rows[f"{method.__name__} {name}"] = {
                "score_of_a_dark_square_over_that_without": float(other.pred_score[1] / other.pred_score[0]),
                "difference_of_scores": difference(other.pred_score, one.pred_score),
                "difference_of_maps": difference(other.anomaly_map, one.anomaly_map),
            }
    return {"packages": ["anomalib", "timm", "lightning"], "methods": rows}


def dinotool() -> dict[str, Any]:
    """The class token and the patches of `DinoToolModel` on a Backbone, beside those of transformers' model.

    DINOv3 is called as transformers' model is, and DINOv2 as Meta's: by the entry of torch.hub.
    """
    import dinotool.cli
    from transformers import AutoModel

    rows: dict[str, Any] = {}
    for name, entry in (("facebook/dinov3-vits16-pretrain-lvd1689m", None), ("dinov2_vits14_reg", "dinov2_vits14_reg")):
        bb = model(entry or "dinov3_vits16")
        with tempfile.TemporaryDirectory() as scratch:
            theirs = AutoModel.from_pretrained(bb.save_pretrained(Path(scratch) / "model")).eval()
        if entry is not None:
            hub = torch.hub.load(str(CAT.parents[1]), entry, source="local", pretrained=False)
            hub.load_state_dict(bb.state_dict())
            bb = hub
        dinotool.cli.load_model = lambda _, made=bb: made
        tool = dinotool.cli.DinoToolModel(name, device="cpu", verbose=False)
        batch = torch.stack([tool.get_transform((224, 224)).transform(image) for image in images()])
        with torch.no_grad():
            expected = nn.functional.normalize(theirs(batch).last_hidden_state, dim=-1)
        maps = tool(batch, features="full").tensor.flatten(1, 2)
        rows[name] = {
            "difference_of_class_tokens": difference(tool(batch, features="frame"), expected[:, 0]),
            "difference_of_patches": difference(maps, expected[:, 5:]),
            "pca": list(tool.pca(tool(batch)).shape),
            "grid": 224 // bb.patch_size,
        }
    return {"packages": ["dinotool", "transformers", "xformers"], "models": rows}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


PROJECTS = {"sentence_transformers": sentence_transformers, "anomalib": anomalib, "dinotool": dinotool}


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
