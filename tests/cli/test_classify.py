"""`dinov3-infer classify` on a random model that transformers could have written."""

from pathlib import Path

import pytest
from cli_runs import refused, run
from oracles import randomise
from pictures import photo
from PIL import Image
from texts import SMALL, small_heads

from dinov3_infer import Backbone
from dinov3_infer.released.attach import load_head, random_head
from dinov3_infer.released.imagenet import imagenet_names
from dinov3_infer.tasks import segments_picture


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


def test_labels_that_are_given(folder: Path) -> None:
    """Names with commas between, or the lines of a file; what fits no head is one sentence."""
    with small_heads():
        head = random_head(SMALL)
        randomise(head, 1)
        backbone = head.backbone.save_pretrained(folder / "nano.pth", "meta")
        path = head.save(folder / "head.safetensors")
        given = (folder / "a.png", "--head", SMALL, "--weights", path, "--backbone", backbone, "--device", "cpu")
        ran = run("classify", *given, "--labels", "cat, a red car,dog", "--template", "a {}.", "--template", "the {}")
        lines = [line.split("  ") for line in ran.out.splitlines()]
        assert ran.status == 0 and sorted(line[3] for line in lines) == ["a red car", "cat", "dog"]
        expected = load_head(SMALL, head.backbone, weights=path).classify(
            folder / "a.png", ["cat", "a red car", "dog"], ["a {}.", "the {}"]
        )
        assert [(int(line[2]), line[3]) for line in lines] == [(guess.label, guess.name) for guess in expected[0]]
        (folder / "names.txt").write_text("tench, Tinca tinca\ngoldfish\n")
        ran = run("classify", *given, "--labels", f"@{folder / 'names.txt'}", "--template", "{}", "--top", 1)
        assert ran.out.rstrip().endswith(("tench, Tinca tinca", "goldfish")) and len(ran.out.splitlines()) == 1
        out = folder / "segments.png"
        ran = run("show", "segments", *given, "--labels", "cat,dog", "--template", "a {}.", "--size", 64, "-o", out)
        (found,) = head.segment(folder / "a.png", ["cat", "dog"], "a {}.", size=64)
        assert ran.status == 0, ran.err
        shown = segments_picture(folder / "a.png", found).convert("RGB")
        assert Image.open(out).convert("RGB").tobytes() == shown.tobytes()
        refused(1, "of another kind, text; give --labels A,B,... or one for classifier", "classify", *given)
        refused(1, "labels are a list of names", "classify", *given, "--labels", " ,")
        other = ("classify", folder / "a.png", "--head", "dinov2_vits14_lc", "--labels", "a,b")
        refused(1, "of another kind, classifier; give one for text, such as", *other)
        refused(1, "--template goes with --labels", "classify", folder / "a.png", "--template", "{}")
