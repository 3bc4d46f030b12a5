"""Fixtures for what `embed` writes to disk."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles import SMALL, randomise
from outputs import fill

from dinov3_infer import Backbone
from dinov3_infer.features.extractor import Extractor


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return randomise(Backbone.from_config(SMALL["dinov3"]))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _parquet(request: pytest.FixtureRequest) -> None:
    if "parquet" in request.node.name:
        pytest.importorskip("pyarrow")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    return fill(tmp_path / "album")


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Ends the next call of `embed` after a given pass, with an exception of its own."""
    launched = Extractor.launched

    def arm(at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        calls = []

        def stopping(self: Extractor, batches: list[Any], *args: Any, **more: Any) -> Any:
            calls.append(0)
            if len(calls) == at:
                monkeypatch.setattr(Extractor, "launched", launched)
                raise error
            return launched(self, batches, *args, **more)

        monkeypatch.setattr(Extractor, "launched", stopping)

    return arm  # type: ignore[return-value]
