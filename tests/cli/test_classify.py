"""`dinov3-infer classify` on a random model that transformers could have written."""

from pathlib import Path

import pytest
from cli_runs import refused, run
from oracles import randomise
from pictures import photo
from PIL import Image

from dinov3_infer import Backbone
from dinov3_infer.released.imagenet import imagenet_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers as t

    path = tmp_path_factory.mktemp("classify")
    config = t.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, num_labels=1000)
    randomise(t.Dinov2ForImageClassification(config), 2).save_pretrained(path / "model")  # type: ignore[operator]
    Image.fromarray(photo(60, 80)).save(path / "a.png")
    (path / "b.png").write_bytes(b"nothing")
    return path


def test_the_likeliest_classes(folder: Path) -> None:
    """A line per class, best first; a file that is no image is skipped and named."""
    ran = run("classify", folder / "a.png", folder / "b.png", "--weights", folder / "model", "--layers", 1, "--top", 3)
    assert ran.status == 3 and "left out" in ran.err and "b.png" in ran.err
    lines = [line.split("  ") for line in ran.out.splitlines()]
    assert len(lines) == 3 and all(line[0].endswith("a.png") for line in lines)
    assert [float(line[1]) for line in lines] == sorted((float(line[1]) for line in lines), reverse=True)
    assert all(imagenet_names()[int(line[2])] == line[3] for line in lines)


def test_what_is_no_classifier(folder: Path) -> None:
    refused(1, "unknown head 'vits14'", "classify", folder / "a.png", "--head", "vits14")
    refused(
        1,
        "its weights have to be asked for|are sent by their owner",
        "classify",
        folder / "a.png",
        "--head",
        "dinov3_vit7b16_lc",
    )  # noqa: E501
    path = Backbone.from_config("dinov2_vits14", seed=0).save_pretrained(folder / "bb.pth", "meta")
    refused(1, "does not fit dinov2_vits14_lc", "classify", folder / "a.png", "--weights", path)
    refused(1, "is of another kind", "classify", folder / "a.png", "--head", "dinov2_vits14_dd")
