"""Runs the examples as a newcomer would, on a small model with random weights."""

import ast
import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from dinov3_infer import Backbone

EXAMPLES = ROOT / "examples"
CAT = str(EXAMPLES / "cat.jpg")
SCRIPTS = [path for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(Backbone.from_config("nano", seed=0).save_pretrained(tmp_path_factory.mktemp("model") / "nano"))


@pytest.fixture
def call(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a script with arguments, in this process and in an empty folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments: object) -> None:
        module = importlib.import_module(script)
        given = [str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *given, "--model", model, "--size", "64"])
        sys.modules["common"].run(module.main)

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Path]:
    """A folder with four crops of the cat, each with depth and segments, and annotations.json."""
    cat, folder = Image.open(CAT), tmp_path / "pictures"
    for name in ("pictures", "depths", "segments"):
        (tmp_path / name).mkdir()
    for i in range(4):
        cat.crop((40 * i, 0, 40 * i + 96, 64)).save(folder / f"{i}.png")
        Image.fromarray(np.full((64, 96), 1000 + 500 * i, np.uint16)).save(tmp_path / "depths" / f"{i}.png")
        labels = np.zeros((64, 96), np.uint16)
        labels[10:40, 20:60] = 1001
        Image.fromarray(labels).save(tmp_path / "segments" / f"{i}.png")
    (tmp_path / "annotations.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in range(4)],
        "annotations": [{"image_id": i, "category_id": 7, "bbox": [20, 10, 40, 30]} for i in range(3)],
        "categories": [{"id": 7, "name": "thing"}],
    }))  # fmt: skip
    yield folder


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_stand_on_the_public_surface(path: Path) -> None:
    """Readers copy the examples, so they import only the package, its tasks and its trainer."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in found if name.split(".")[0].startswith("dinov3_infer")}
    assert ours <= {"dinov3_infer", "dinov3_infer.tasks", "dinov3_infer.train"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("README.md",), "is a text file, not an image"), (("none.jpg",), "none.jpg"), ((CAT, "vitz"), "vitz"),
        ((CAT, "", "x.nothing"), ".nothing"),
    ],
)  # fmt: skip
def test_quickstart_says_what_is_wrong(arguments: tuple[str, ...], said: str) -> None:
    command = [sys.executable, EXAMPLES / "quickstart.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("quickstart.py: ") and said in done.stderr


def test_quickstart(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", CAT, "", tmp_path / "pca.png"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=True,
    )
    assert "[1, 192, 32, 48]" in run.stdout
    assert Image.open(tmp_path / "pca.png").size == (2 * 512 + 3 * 8, 341 + 2 * 8)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_named_in_the_readme(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("retrieval", [CAT, "pictures", "--count", 3]),
        ("foreground", [CAT]),
        ("discovery", [CAT, "--count", 2]),
        ("matching", [CAT, CAT]),
        ("matching", [CAT, CAT, "--point", "100,80"]),
        ("anomaly", ["pictures", CAT]),
        ("depth", ["pictures", "depths", CAT, "--head", "linear", "--steps", 2]),
        ("depth", ["pictures", "depths", CAT, "--head", "dpt", "--steps", 2]),
        ("normals", ["pictures", "depths", CAT, "--steps", 2]),
        ("detection", ["pictures", "annotations.json", CAT, "--steps", 2]),
        ("masks", ["pictures", "segments", CAT, "--steps", 2]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(v) for v in value if "cat" not in str(v)),
)
def test_it_runs_and_writes_an_image(
    script: str, arguments: list[object], call: Any, pictures: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And says what it does: the model, the features of many images, the steps of a training."""
    call(script, *arguments, "--out", "out.png")
    assert len(np.unique(np.asarray(Image.open("out.png")))) > 50
    said = [record.getMessage() for record in caplog.records if record.name == "dinov3_infer.examples"]
    assert said[0] == f"loading {model}"
    if script != "discovery":  # one image
        assert any("features of" in line or "embedding the" in line for line in said)
    if "--steps" in arguments:
        assert f"training a head with {len(list(pictures.iterdir()))} examples, 2 steps" in said
        assert sum(line.startswith("step ") for line in said) == 2 and "step 2 of 2: loss " in said[-2] + said[-1]
    assert logging.getLogger("dinov3_infer").level == logging.NOTSET


def test_tracking_follows_through_a_folder_a_gif_and_a_box(call: Any, pictures: Path) -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[10:40, 20:60] = 1
    Image.fromarray(mask).save("mask.png")
    call("tracking", "pictures", "mask.png", "--out", "first.gif")
    assert Image.open("first.gif").n_frames == 4
    call("tracking", "first.gif", "--box", "20,10,60,40", "--out", "second.gif")
    assert Image.open("second.gif").n_frames == 4


def test_video_tells_classes_apart(call: Any, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, colour in (("red", "red"), ("blue", "blue")):
        for number in range(4):
            frames = [Image.new("RGB", (32, 32), colour) for _ in range(3)]
            frames[0].putpixel((number, 0), (255, 255, 255))
            (path := Path("videos") / name).mkdir(parents=True, exist_ok=True)
            frames[0].save(path / f"{number}.gif", save_all=True, append_images=frames[1:])
    call("video", "videos", "videos/red/0.gif", "--frames", 2, "--out", "out.jpg")
    assert "red" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("matching", [CAT, "nowhere.jpg"], "nowhere.jpg"),
        ("matching", [CAT, CAT, "--point", "9999,5"], "points lie inside an image of 451 x 300 pixels"),
        ("matching", [CAT, CAT, "--point", "9999"], "--point is X,Y"),
        ("matching", [CAT, CAT, "--out", "out.txt"], "--out should end in one of"),
        ("retrieval", [CAT, "empty"], "no images under"),
        ("anomaly", ["one", CAT], "at least 2 good images, got 1"),
        ("tracking", ["empty", "--box", "1,1,9,9"], "no images under"),
        ("tracking", ["broken.mp4", "--box", "1,1,9,9"], "broken.mp4"),
        ("tracking", ["pictures"], "give either a mask or --box"),
        ("tracking", ["pictures", "--box", "1,1"], "--box is L,T,R,B"),
        ("tracking", ["pictures", "black.png"], "the mask is empty"),
        ("tracking", ["pictures", CAT], "give a grey image"),
        ("depth", ["pictures", "empty", CAT], "give one for each image"),
        ("depth", ["pictures", "unknown", CAT], "no depth is above 0"),
        ("tracking", ["sizes", "--box", "1,1,9,9"], "the frames differ in size"),
        ("normals", ["pictures", "depths", CAT, "--focal", 0], "the focal length"),
        ("detection", ["pictures", "black.png", CAT], "is not in COCO's format"),
        ("detection", ["pictures", "none.json", CAT], "has 0 images and 0 categories"),
        ("masks", ["pictures", "pictures", CAT], "give a 16-bit grey PNG"),
        ("masks", ["pictures", "empty", CAT], "no such file"),
        ("video", ["one", CAT], "at least 2 classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_wrong_is_said_in_one_sentence(
    script: str, arguments: list[object], message: str, call: Any, pictures: Path, tmp_path: Path
) -> None:
    for name in ("empty", "one", "unknown", "sizes"):
        (tmp_path / name).mkdir()
    for i in (1, 2):
        Image.new("RGB", (64 * i, 64)).save(f"sizes/{i}.png")
    Path("none.json").write_text('{"images": [], "annotations": [], "categories": []}')
    Image.open(CAT).save("one/cat.png")
    for i in range(4):
        np.save(f"unknown/{i}.npy", np.zeros((64, 96)))
    Image.fromarray(np.zeros((64, 96), np.uint8)).save("black.png")
    Path("broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(SystemExit) as stopped:
        call(script, *arguments)
    text = str(stopped.value)
    assert message in text and "\n" not in text and text.startswith(f"{script}.py: "), text
