"""`embed` writes the vectors of the library."""

import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from cli_runs import listed, refused, run, small_model, vectors, write_pictures

from dinov3_infer import Backbone
from dinov3_infer.cli.parser import parse

MODEL = ("-m", small_model(), "--device", "cpu")

SMALL = ("--size", "64")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), {}),
        (("--pooling", "cls_mean", *SMALL), dict(pooling="cls_mean", size=64)),
        (("--fit", "native", "--size", "48"), dict(fit="native", size=48)),
        (("--fit", "native", "--size", "own"), dict(fit="native")),
        (("--fit", "crop", "--size", "32x48", "--batch-size", "1"), dict(fit="crop", size=(32, 48))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_embed_writes_what_the_library_gives(
    flags: tuple[str, ...], options: dict[str, object], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.jpg", "c.png")
    ran = run("embed", tmp_path / "in", "-o", tmp_path / "x.npy", *MODEL, *flags)
    expected = vectors(sorted((tmp_path / "in").iterdir()), **options)
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == f"dinov3-infer: wrote '{tmp_path / 'x.npy'}': 3 vectors of {expected.shape[1]} numbers\n"
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


def test_embed_normalizes(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    assert run("embed", tmp_path, "-o", tmp_path / "x.npy", *MODEL, *SMALL, "--normalize").status == 0
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "x.npy"), axis=1), 1, rtol=1e-6)


def test_embed_goes_on_after_a_bad_image(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "broken.png", "c.png")
    out = tmp_path / "x.npy"
    ran = run("embed", tmp_path / "in", "-o", out, *MODEL, *SMALL)
    assert (ran.status, ran.out) == (3, "")
    assert f"3 vectors of 192 numbers; 1 could not be read (its row is NaN), see '{tmp_path / 'x.jsonl'}'" in ran.err
    rows = listed(tmp_path / "x.jsonl")
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert [Path(str(row["path"])).name for row in rows] == ["a.png", "broken.png", "c.png"]
    before = out.read_bytes()
    refused(
        1, "cannot decode", "embed", tmp_path / "in", "-o", out, *MODEL, *SMALL, "--on-error", "raise", "--overwrite"
    )
    assert out.read_bytes() == before, "what is there is replaced when the new one is whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "x.json", "x.jsonl", "x.npy"]
    assert run("embed", tmp_path / "in" / "broken.png", "-o", tmp_path / "y.npy", *MODEL).status == 1, (
        "nothing was done"
    )


def test_a_list_may_name_what_is_gone(tmp_path: Path) -> None:
    """A missing path in a list affects only its row, since programs write such lists."""
    write_pictures(tmp_path, "a.png")
    (tmp_path / "list").write_text(f"{tmp_path / 'a.png'}\n{tmp_path / 'gone.png'}\n")
    assert run("embed", f"@{tmp_path / 'list'}", "-o", tmp_path / "x.npy", *MODEL, *SMALL).status == 3
    assert "no image at" in str(listed(tmp_path / "x.jsonl")[1]["error"])


# Options of Python that the command lacks or gives another default, with the reason.
OTHERWISE = {
    "on_error": "a command goes on after an image that cannot be read, and its exit status says so",
    "progress": "a bar is shown on a terminal, and --quiet hides it",
    "weights": "-m takes a file; a name for a file without one is given to `verify`",
    "rope_periods": "for comparisons with other code, which are made in Python",
    "layout": "`convert --layout` writes the file under names that tell",
    "num_heads": "`convert --num-heads` writes it into a config.json",
    "token": "a command line is no place for a secret: hf auth login, or HF_TOKEN",
    "cache_dir": "HF_HUB_CACHE",
    "local_files_only": "HF_HUB_OFFLINE=1",
}


@pytest.mark.parametrize("method", ["embed", "from_pretrained"])
def test_the_command_has_every_option_of_python(method: str) -> None:
    """Under the same name, with the same default and the same choices."""
    function = getattr(Backbone, method)
    options = inspect.signature(function).parameters.values()
    hints = get_type_hints(inspect.unwrap(getattr(function, "__func__", function)))
    there = vars(parse(["embed", "in", "-o", "out"]))
    for one in options:
        if one.kind is not one.KEYWORD_ONLY:
            continue
        name = one.name
        assert name in there or name in OTHERWISE, f"--{name.replace('_', '-')} is missing"
        if name in OTHERWISE:
            assert name not in there or there[name] != one.default, f"{name} is no exception"
            continue
        assert there[name] == one.default, name
        for choice in _choices(hints[name]) if isinstance(one.default, str) else ():
            flag = f"--{name.replace('_', '-')}"
            assert vars(parse(["embed", "in", "-o", "out", flag, choice]))[name] == choice


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()
