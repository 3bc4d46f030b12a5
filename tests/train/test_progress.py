"""What a training run says: a bar on a terminal, lines elsewhere, and verdicts in both."""

import io
import logging
import sys
from typing import Any

import pytest

from dinov3_infer.train.progress import Progress

METRICS: dict[str, Any] = {"loss": 2.5, "lr": 1e-3, "images_per_second": 12.34}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "terminal, shown, bar, line",
    [
        (False, None, False, True), (True, None, True, False), (False, False, False, False),
        (True, False, False, False), (False, True, True, False), (True, True, True, False),
    ],
)  # fmt: skip
def test_there_is_a_bar_or_there_are_lines(
    terminal: bool, shown: bool | None, bar: bool, line: bool, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO, "dinov3_infer"), Progress(20, 4, shown) as progress:
        progress.advance()
        progress.tell(5, METRICS)
    assert ("5/20" in stream.getvalue()) is bar
    said = [record.getMessage() for record in caplog.records]
    assert said == (["step 5 of 20: loss 2.5000, learning rate 1.00e-03, 12.3 images per second"] if line else [])


@pytest.mark.parametrize("shown", [None, False, True])
@pytest.mark.parametrize("verdict, level", [("healthy", logging.INFO), ("collapsing", logging.WARNING)])
def test_a_verdict_is_always_said(
    verdict: str, level: int, shown: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dinov3_infer"), Progress(20, 0, shown) as progress:
        progress.tell(5, METRICS | {"verdict": verdict, "reason": "features spread"})
    last = caplog.records[-1]
    assert (last.levelno, last.getMessage()) == (level, f"step 5, {verdict}: features spread")
