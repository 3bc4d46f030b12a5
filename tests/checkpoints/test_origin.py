"""A loaded model states the value and the source of each setting."""

from dataclasses import replace
from pathlib import Path

import pytest
from layouts import FORMS, SOURCES, small_models_are_known as small_models_are_known
from oracles import hf_model

from dinov3_infer import Backbone


@pytest.mark.parametrize("named", [False, True], ids=["bare", "named"])
@pytest.mark.parametrize("key", ["dinov3", "dinov3_no_bias", "dinov2_reg", "dinov2_gated", "dino"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_taken_by_default_in_silence(
    form: str, key: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every field of `origin` has a source, and a warning names every default."""
    config = SOURCES[key] if named else replace(SOURCES[key], depth=3)  # the shape of a known model, or of none
    monkeypatch.setitem(SOURCES, key, config)
    path = FORMS[form](tmp_path, hf_model(config), key)
    bb = Backbone.from_pretrained(path, device="cpu", num_heads=SOURCES[key].num_heads)
    fields = {"layout", "architecture", "num_heads", "norm_eps", "transform", "mean and std", "name", "licence"}
    fields |= {"rope_base"} if bb.config.position_grid is None else set()
    assert set(bb.origin) == fields
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    for field, text in bb.origin.items():
        said = any(f"the {field}" in line and text in line for line in warned)
        assert said is ("default" in text), (field, text, warned)
        assert ", from " in text or field in ("name", "licence")
