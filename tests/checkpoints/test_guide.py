"""The code in the guide on checkpoints runs."""

import re
from pathlib import Path

import pytest
from repository import EXAMPLES

from dinov3_infer.checkpoints import refusals

GUIDE = EXAMPLES / "guides" / "checkpoints.md"


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks run, one after the other."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})
    printed = capsys.readouterr().out
    assert "num_heads: 3, from config.json" in printed and "licence: Apache-2.0" in printed


def test_it_names_all_that_is_refused() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for one in refusals._NEIGHBOURS:
        assert one.name.split(" (")[0] in text, one.name
