"""The linear classifiers of ImageNet-1k."""

from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Images
from ..checkpoints.reading import Checkpoint
from ..errors import InputError
from ..model.network import BackboneOutput, LayerOutput
from .catalogue import HeadInfo
from .head import Released, shape_of

__all__ = ["Classifier", "Guess", "imagenet_names", "vector_of"]

_NAMES = Path(__file__).parent.parent / "data" / "labels" / "imagenet1k.txt"
# of each vector how many layers it takes, and how often as wide as the backbone it is
_VECTORS = {"cls_mean": (1, 2), "cls4_mean": (4, 5), "cls4": (4, 4), "interleaved": (1, 2)}


class Guess(NamedTuple):
    """One of the likeliest classes of an image."""

    label: int
    name: str
    probability: float


class Classifier(Released):
    """Logits of classes from the class tokens of some layers and the mean of the patches, all after the final norm."""

    rules = (
        (r"(?:module\.)?(?:linear_head\.|linear\.|classifier\.)?(weight|bias)", r"\1"),
        (r"(dinov2|dinov2_with_registers)\..*", ""),  # transformers keeps the backbone in the same file
    )

    def __init__(self, info: HeadInfo, backbone: Backbone, classes: int = 1000) -> None:
        super().__init__(info, backbone)
        self.vector: str = info.options["vector"]
        width = _VECTORS[self.vector][1] * backbone.embed_dim
        self.weight = nn.Parameter(torch.zeros(classes, width, device=backbone.device))
        self.bias = nn.Parameter(torch.zeros(classes, device=backbone.device))
        self.names: tuple[str, ...] = imagenet_names() if classes == 1000 else tuple(map(str, range(classes)))

    @classmethod
    def made_for(cls, info: HeadInfo, backbone: Backbone, checkpoint: Checkpoint) -> Self:
        shape = shape_of(checkpoint, cls.names_in(checkpoint)[0], "weight")
        found = cls(info, backbone, shape[0] if shape else 1000)
        stated = checkpoint.config.get("id2label")
        if isinstance(stated, dict) and len(stated) == len(found.bias) and str(stated.get("0")) != "LABEL_0":
            found.names = tuple(str(stated.get(str(i), i)) for i in range(len(stated)))
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H_px, W_px] -> logits [B, classes]."""
        return self.logits(self.backbone(pixels, layers=_VECTORS[self.vector][0]))

    def logits(self, output: BackboneOutput) -> Tensor:
        """Of a backbone's output with the layers that this head takes."""
        vector = vector_of(output, self.vector)
        return nn.functional.linear(vector.to(self.weight.dtype), self.weight, self.bias)

    @torch.no_grad()
    def predict(self, images: Images, top: int = 5) -> list[list[Guess]]:
        """The likeliest classes of each image, best first.

        `images`: as in `extract_features`, prepared as Meta evaluates the head.

        Raises: as `extract_features`; InputError for a number of classes that there is not.
        """
        if not isinstance(top, int) or not 1 <= top <= len(self.names):
            raise InputError(f"top is a number of classes from 1 to {len(self.names)}, got {top!r}")
        batch = self.pixels(images)
        extractor = self.backbone.extractor
        layers = extractor.layers(_VECTORS[self.vector][0], "cls", "token")
        found = extractor.features([batch], layers)[0]
        picked = (LayerOutput(one.cls_token, one.register_tokens, one.patch_tokens) for one in found.layers)
        output = BackboneOutput(found.cls_token, found.register_tokens, found.patch_tokens, tuple(picked))
        best = self.logits(output).float().softmax(dim=-1).cpu().topk(top, dim=-1)
        return [
            [Guess(label, self.names[label], p) for label, p in zip(labels, values, strict=True)]
            for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def vector_of(output: BackboneOutput, kind: str) -> Tensor:
    """What a classifier sees: [B, n C] of a backbone's output with its last 1 or 4 layers.

    "cls_mean": class token, mean of the patches.  "cls4": class tokens of the last four layers, in order of depth;
    "cls4_mean": these and the mean of the last layer's patches.  "interleaved": class token and mean, number by number.
    """
    cls_token, mean = output.cls_token, output.patch_tokens.mean(dim=1)
    if kind == "interleaved":
        return torch.stack((cls_token, mean), dim=-1).flatten(1)
    if kind == "cls_mean":
        return torch.cat((cls_token, mean), dim=-1)
    tokens = [layer[0] for layer in output.layers]
    return torch.cat((*tokens, *([mean] if kind == "cls4_mean" else [])), dim=-1)


@cache
def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1k in their usual order, in WordNet's words."""
    return tuple(_NAMES.read_text(encoding="utf-8").splitlines()[1:])
