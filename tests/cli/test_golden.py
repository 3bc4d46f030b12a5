"""The recorded vectors: correct weights and arithmetic reproduce them, mistakes do not."""

import pytest
import torch
from PIL import Image

from dinov3_infer.cli import doctor as doctor_command, verify as verify_command
from dinov3_infer.cli.golden import FORMULA, by_formula
from dinov3_infer.recorded import IMAGES, compute, difference, known


def test_the_shipped_data() -> None:
    """The images are small, with sides of 112 pixels, and every model of make_golden.py has a record."""
    assert all(Image.open(path).size == (112, 112) for path in IMAGES)
    assert sum(path.stat().st_size for path in IMAGES[0].parent.iterdir()) < 60_000
    records = known()
    assert records[0].what == FORMULA and by_formula().fingerprint() == records[0].fingerprint
    assert len({record.fingerprint for record in records}) == len(records) and not any(r.model for r in records[:2])


def test_the_formula_gives_the_recorded_vectors_and_mistakes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bb, recorded = by_formula(), known()[0].vectors
    assert difference(compute(bb), recorded) < doctor_command.CLOSE["cpu"] / 4
    bb.set_attention("eager")
    assert difference(compute(bb), recorded) < doctor_command.CLOSE["cpu"] / 4
    assert bb.rope_periods is not None
    bb.rope_periods *= 1.01
    assert difference(compute(bb), recorded) > 2 * verify_command.CLOSE
    gelu = torch.nn.functional.gelu
    bb = by_formula()
    bb.mode = "plain"  # in a plan GELU is part of a product
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))
    assert difference(compute(bb), recorded) > verify_command.CLOSE
