"""Models for the tests of tasks."""

import pytest
import torch
from oracles import SMALL, randomise

from dinov3_infer import Backbone


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return randomise(Backbone.from_config(SMALL["dinov3"]))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def local() -> Backbone:
    """A model whose patches do not attend to each other, so the output of a patch does not depend on its window."""
    model = randomise(Backbone.from_config(SMALL["dinov3"]))
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.ls1.gamma.zero_()
    return model  # type: ignore[return-value]
