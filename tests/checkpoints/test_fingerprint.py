"""Fingerprints distinguish weights."""

import pytest
import torch
from layouts import SOURCES
from oracles import hf_model

from dinov3_infer import Backbone


@pytest.mark.parametrize("key", ["dinov3", "dinov3_gated", "dinov2_reg", "dino"])
def test_any_other_value_is_another_fingerprint(key: str) -> None:
    """One changed element in any tensor changes the fingerprint, except in tensors that features do not depend on."""
    model = Backbone.adopt(hf_model(SOURCES[key]))
    before = model.fingerprint()
    for name, tensor in model.state_dict().items():
        last = tensor.view(-1)[-1:]
        kept = last.clone()
        last += 0.1 if name in ("cls_token", "pos_embed") else last.abs() * 2e-7  # the first two count as their sum
        assert not torch.equal(last, kept)
        assert (model.fingerprint() == before) == (name in ("mask_token", "rope_periods")), name
        last.copy_(kept)
    assert model.fingerprint() == before
    if not model.config.key_bias:
        with torch.no_grad():
            model.blocks[0].attn.qkv.bias[64:128] = 3.0  # the key's third, which counts as zero
        assert model.fingerprint() == before
