"""The guide on checkpoints agrees with the code; test_snippets runs its blocks."""

from repository import EXAMPLES

from dinov3_infer import Backbone
from dinov3_infer.checkpoints import refusals

GUIDE = EXAMPLES / "guides" / "checkpoints.md"


def test_it_quotes_the_origin_of_a_model() -> None:
    origin = Backbone.from_pretrained("nano", device="cpu").origin
    assert f"`num_heads: {origin['num_heads']}`" in GUIDE.read_text(encoding="utf-8")
    assert origin["licence"].startswith("Apache-2.0")


def test_it_names_all_that_is_refused() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for one in refusals._NEIGHBOURS:
        assert one.name.split(" (")[0] in text, one.name
