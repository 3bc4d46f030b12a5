"""Names and variants of released heads, and that the guide speaks of heads that there are."""

import re

import pytest
from repository import EXAMPLES

from dinov3_infer import InputError, ModelNotFoundError, UnsupportedError
from dinov3_infer.released.catalogue import HEADS, find_head, variant_of


@pytest.mark.parametrize(
    ("name", "dataset", "layers", "expected"),
    [
        ("dinov2_vits14_lc", None, None, 4), ("dinov2_vits14_lc", None, 1, 1), ("dinov2_vits14_dd", None, None, "NYU"),
        ("dinov2_vits14_dd", "KITTI", None, "KITTI"), ("dinov2_vits14_ld", None, None, ("NYU", 4)),
        ("dinov2_vits14_ld", "KITTI", None, ("KITTI", 4)), ("dinov2_vits14_ld", None, 1, ("NYU", 1)),
        ("dinov2_vits14_ld", "KITTI", 1, ("KITTI", 1)), ("dinov3_vitl16_chmv2", None, None, None),
    ],
)  # fmt: skip
def test_variants(name: str, dataset: str | None, layers: int | None, expected: object) -> None:
    assert variant_of(name, dataset, layers) == expected == find_head(name, expected).variant


@pytest.mark.parametrize(
    ("name", "dataset", "layers", "given"),
    [
        ("dinov2_vits14_lc", "NYU", None, "'NYU'"), ("dinov2_vits14_lc", "NYU", 4, r"\('NYU', 4\)"),
        ("dinov2_vits14_lc", None, 2, "2"), ("dinov2_vits14_ade20k_ms", None, 4, "4"),
    ],
)  # fmt: skip
def test_variants_that_were_not_released(name: str, dataset: str | None, layers: int | None, given: str) -> None:
    with pytest.raises(InputError, match=f"{name} was released for .*, not for {given}$"):
        find_head(name, variant_of(name, dataset, layers))


def test_unknown_names() -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean .*'dinov2_vits14_ade20k_linear'"):
        variant_of("dinov2_vits14_ade20_linear")


def test_the_guide_names_heads_that_there_are() -> None:
    """Each is in the catalogue, or left out with a reason; and no kind of head is missing from it."""
    text = (EXAMPLES / "guides" / "heads.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bdinov?\d?_vit\w+", text)) - {"dinov2_vits14"}
    rows = {row.name: row for row in HEADS}
    for name in named - rows.keys():
        with pytest.raises(UnsupportedError):
            find_head(name)
    said = {rows[name].kind for name in named & rows.keys()}
    assert {"classifier", "depth", "segments"} <= said
