"""Identifies weights independent of the file that holds them."""

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.vit import ViTConfig
from ..zoo import Config

__all__ = ["fingerprint"]


def fingerprint(state: Mapping[str, Tensor], config: Config) -> str:
    """SHA-256 over the tensors that features depend on; equal for equal weights in every layout.

    Tensors that some layouts do not store are left out: mask token, norm for local crops, RoPE periods.  Zero biases
    count as absent, and the class token includes its position, as in timm's files.

    Args:
        state: Our parameter names and tensors, of the shapes in the model.
        config: The config of the model.

    Returns: 64 hex digits.
    """
    digest = hashlib.sha256()
    canonical = {
        name: tensor for name, tensor in state.items() if not re.match(r"mask_token|local_cls_norm|rope_periods", name)
    }
    if "pos_embed" in state:
        canonical["cls_token"] = state["cls_token"].float() + state["pos_embed"][:, :1].float()
        canonical["pos_embed"] = state["pos_embed"][:, 1:]
    for name in sorted(canonical):
        tensor = canonical[name].detach().to("cpu", torch.float32)
        if name.endswith("attn.qkv.bias") and isinstance(config, ViTConfig) and not config.key_bias:
            tensor = torch.cat([part * keep for part, keep in zip(tensor.chunk(3), (1.0, 0.0, 1.0), strict=True)])
        if name.endswith("attn.qkv.bias") and not tensor.any():
            continue
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update((tensor + 0.0).contiguous().numpy().data)  # + 0.0: minus zero counts as zero
    return digest.hexdigest()
