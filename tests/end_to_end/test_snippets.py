"""Every Python and shell block of README and guides runs, or says why not."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from snippets import PAGES, RUN, Block, Reader, blocks, commands, name_of, replaced, world

RUNNABLE = {name_of(page): [block for block in blocks(page) if block.language in RUN] for page in PAGES}
WITH_CODE = {name: found for name, found in RUNNABLE.items() if any(block.kind != "not run" for block in found)}
LEFT_OUT = [block for found in RUNNABLE.values() for block in found if block.kind == "not run"]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reading = Reader()
    yield reading
    reading.close()


def check(reader: Reader, folder: Path, found: list[Block], kinds: set[str]) -> None:
    wanted = [block for block in found if block.kind in kinds]
    world(folder, "\n".join(block.code for block in wanted))
    wrong = reader.read(folder, wanted)
    assert wrong is None, wrong


@pytest.mark.parametrize("page", [name for name, found in WITH_CODE.items() if any(b.kind == "run" for b in found)])
def test_the_blocks_of_a_page_run(reader: Reader, tmp_path: Path, page: str) -> None:
    check(reader, tmp_path, WITH_CODE[page], {"run"})


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, found in WITH_CODE.items() if any(b.kind == "slow" for b in found)])
def test_all_blocks_of_a_page_run(reader: Reader, tmp_path: Path, page: str) -> None:
    lacking = {block.where: name for block in WITH_CODE[page] if block.kind == "slow"
               for name in re.findall(r"needs (\w+)", block.reason) if find_spec(name) is None}  # fmt: skip
    check(reader, tmp_path, [block for block in WITH_CODE[page] if block.where not in lacking], {"run", "slow"})
    if lacking:
        pytest.skip(f"all other blocks ran; not installed: {lacking}")


@pytest.mark.parametrize("block", LEFT_OUT, ids=lambda block: block.where)
def test_blocks_that_are_not_run(block: Block) -> None:
    """They are counted and listed, with their reasons, among the tests that were skipped."""
    if block.language == "python":
        compile(block.code, block.where, "exec")
    pytest.skip(f"{block.where} is not run: {block.reason}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_hides_outside_of_a_block(page: Path) -> None:
    """Code that is indented with spaces would not be run."""
    text = re.sub(r"```[\s\S]*?```", "", page.read_text(encoding="utf-8"))
    assert not re.search(r"^ {4}(python|pip|dinov3-infer|torchrun|pytest|from|import) ", text, re.MULTILINE)


@pytest.mark.parametrize(
    "code, language, words",
    [
        ("bb = undefined_name", "python", "NameError"),
        ("dinov3-infer show pca photos/*.jpg", "bash", "ended with 2"),
        (
            "dinov3-infer features photos/0.jpg -o maps && dinov3-infer models; frobnicate",
            "bash",
            "frobnicate is not known",
        ),
        ("python examples/quickstart.py nothing.jpg", "bash", "ended with quickstart.py"),
        ('pip install ".[nonsense]"', "bash", "no extra {'nonsense'}"),
        ('from dinov3_infer import Backbone\nBackbone.from_pretrained("facebook/unknown-model")', "python", "NotFound"),
    ],
    ids=["name", "usage", "program", "script", "extra", "hub"],
)
def test_a_broken_block_is_noticed(reader: Reader, tmp_path: Path, code: str, language: str, words: str) -> None:
    world(tmp_path, "")
    wrong = reader.read(tmp_path, [Block("page.md:7", language, code)])
    assert wrong is not None and wrong.startswith("page.md:7\n") and words in wrong, wrong


def test_a_block_that_ends_the_process_is_noticed(reader: Reader, tmp_path: Path) -> None:
    world(tmp_path, "")
    wrong = reader.read(tmp_path, [Block("page.md:7", "python", "import os\nos._exit(7)")])
    assert wrong is not None and wrong.startswith("page.md:7: ") and "ended with 7" in wrong
    assert reader.read(tmp_path, [Block("page.md:9", "python", "1 + 1")]) is None


def test_marks_and_names() -> None:
    code = 'a = "vitb16", "dinov2_vits14_lc", "nano", "facebook/dinov3-vits16-pretrain-lvd1689m", "my/vitb16"'
    assert replaced(code, "") == 'a = "nano", "dinov2_vits14_lc", "nano", "someone/nano", "my/vitb16"'
    link = "https://host/dinov3_vits16_pretrain_lvd1689m-08c60483.pth?Policy=..."
    assert replaced(link, "http://here") == "http://here/nano-meta.pth?Policy=..."
    assert list(commands("a 'b c' # d\ne \\\n  f; g && h")) == [["a", "b c"], ["e", "f"], ["g"], ["h"]]


def test_marks_need_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snippets.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: no GPU -->\n```bash\na\n```\n\n<!-- slow: long -->\n```python\nb\n```\n```text\nc\n```\n"
    )
    assert [(b.where, b.language, b.kind, b.reason) for b in blocks(page)] == [
        ("page.md:2", "bash", "not run", "no GPU"),
        ("page.md:7", "python", "slow", "long"),
        ("page.md:10", "text", "run", ""),
    ]
    for text, words in (("<!-- not run -->\n```bash\na\n```\n", "no reason"), ("```\na\n```\n", "without a language")):
        page.write_text(text)
        with pytest.raises(ValueError, match=words):
            blocks(page)
