"""The figures of README and guides are those of the records, and their links lead somewhere.

python tests/benchmarks/figures.py     # writes the figures
"""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, benchmarks_importable

from benchmarks import cpu
from dinov3_infer import tasks

PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md")), *sorted((ROOT / ".github").glob("*.md"))]
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
# A number that was measured: with a unit of time or memory, a multiple, a share, or an interval.
MEASURED = re.compile(
    r"\d[\d.,]* (?:times as|times the|ms\b|s\b|seconds|minutes|hours|[MG]i?B\b|%|± \d)"
    r"|\b\d\.\d+ (?:to|of|±) |\b0\.\d{3}\b"
)
# What looks like one and is a setting, a size or a limit of the code.
SETTINGS = ("95 %", "1 GiB")
PUBLISHED = {"heads.md", "convnext.md", "text.md"}  # their figures are those of the owners, and they say so


@pytest.fixture(scope="module")
def figures() -> Iterator[Any]:
    with benchmarks_importable():
        yield import_module("figures")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_figures_of_a_page_are_those_of_the_records(figures: Any, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert figures.filled(text) == text, "run python tests/benchmarks/figures.py"
    marks = re.findall(r"<!-- ([\w-]+) -->", text)
    assert marks == [found["name"] for found in figures.MARK.finditer(text)], "a mark without its end"
    assert not re.search(r"^<!--.*-->.", text, re.MULTILINE), "a line that begins with a mark is no Markdown"


def test_every_figure_is_on_a_page(figures: Any) -> None:
    shown = {found["name"] for page in figures.PAGES for found in figures.MARK.finditer(page.read_text("utf-8"))}
    assert shown == set(figures.FIGURES)


def test_a_changed_record_is_noticed(figures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "examples" / "guides" / "embedding.md").read_text(encoding="utf-8")
    read = figures.record
    monkeypatch.setattr(figures, "record", lambda name: read(name) | ({"kills": 21} if name == "embed_kill" else {}))
    assert "killed 21 times<!-- /embed-kill -->" in figures.filled(text) != text
    with pytest.raises(KeyError, match="nonsense"):
        figures.filled("<!-- nonsense -->1<!-- /nonsense -->")


@pytest.mark.parametrize("page", [ROOT / "README.md", *(p for p in GUIDES if p.name not in PUBLISHED)], ids=name)
def test_no_measured_figure_is_typed_by_hand(figures: Any, page: Path) -> None:
    """Outside of code, marks and tables of marks."""
    text = FENCE.sub("", figures.MARK.sub("", page.read_text(encoding="utf-8")))
    for setting in SETTINGS:
        text = text.replace(setting, "")
    assert MEASURED.findall(text) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files that exist, and headings that exist in them, as GitHub makes anchors of them."""
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_every_guide_is_in_the_index() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in GUIDES if f"guides/{page.name})" not in text] == []


def test_every_probe_is_in_the_guide_and_every_common_option_in_the_readme() -> None:
    guide = (ROOT / "examples" / "guides" / "tasks.md").read_text(encoding="utf-8")
    probes = [name for name in tasks.__all__ if name.endswith("Probe") and name != "Probe"]
    assert [name for name in (*probes, "KNN") if f"| `{name}` |" not in guide] == [] != probes
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [flag for flag in ("-v", "--verbose", "-q", "--quiet", "--debug") if f"`{flag}`" not in readme] == []


def test_the_table_of_the_contest() -> None:
    cells = [
        {"cell": {"model": cpu.MODELS[letter], "pixels": pixels, "batch": 1},
         "results": {"int8, openvino": {"ratio": ratio, "spread": 0.025}}}
        for letter, pixels, ratio in (("B", 224, 1.0), ("S", 512, 1.25), ("S", 224, 1.5))
    ]  # fmt: skip
    rows = cpu.table({"cells": cells}).splitlines()
    assert rows[0] == "| ViT | pixels | batch | openvino int8 |" and len(rows) == 5
    assert rows[2:] == [
        "| S | 224 | 1 | 1.50 ± 0.03 |",
        "| S | 512 | 1 | 1.25 ± 0.03 |",
        "| B | 224 | 1 | 1.00 ± 0.03 |",
    ]
