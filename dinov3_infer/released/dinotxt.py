"""dino.txt: images and texts in one space, to classify and to segment by labels that nobody trained on.

Source: dino.txt (arXiv 2412.16334); dinov3/eval/text and notebooks of dinov3 at 6876159, dinov2/hub/text at b8931f7.
"""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Images
from ..errors import InputError
from ..images.decode import load_image
from ..images.opening import each_image
from ..images.preprocess import PixelBatch, Placement
from ..model.network import as_map
from .catalogue import HeadInfo
from .head import Released
from .imagenet import Guess
from .tokenizer import Tokenizer
from .towers import TextTower, VisualTower
from .windows import LONGEST, SegmentMap, check_short_side, largest, over_windows

__all__ = ["DinoTxt", "Labels", "clip_templates"]

SCALE = 100.0  # of cosines where Meta's notebooks classify; they segment without
SHORT = 512  # pixels of the short side of an image that is segmented
WINDOW, STRIDE = 384, 192  # pixels
TEXTS, IMAGES = 256, 8  # of one pass
_TEMPLATES = Path(__file__).parent.parent / "data" / "text" / "templates.txt"


class Labels(NamedTuple):
    """Names of classes as vectors of length 1, see `DinoTxt.encode_labels`."""

    names: tuple[str, ...]
    vectors: Tensor  # [K, 2 C], for whole images
    dense: Tensor  # [K, C], for patches


class DinoTxt(Released):
    """A backbone with a vision head, and a text tower.

    Vectors have 2 C numbers: the first half is that of the class token, the second that of the mean of the patches.
    """

    rules = (
        (r"visual_model\.backbone\..*", ""),
        (r"(?:visual_model\.head\.)?(?:blocks|block_list)\.(\d+\..*)", r"visual_model.head.blocks.\1"),
        (r"(?:visual_model\.head\.)?(ln_final\..*)", r"visual_model.head.\1"),
        (r"(?:text_model\.)?((?:backbone|head)\..*)", r"text_model.\1"),
        (r"logit_scale", "logit_scale"),
    )

    def __init__(self, info: HeadInfo, backbone: Backbone) -> None:
        super().__init__(info, backbone)
        with backbone.device:
            self.visual_model = VisualTower(backbone)
            self.text_model = TextTower(outputs=2 * backbone.embed_dim, **info.options["text"])
            self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # which training began with
        self.tokenizer = Tokenizer()
        self.eval()

    def head_state(self) -> dict[str, Tensor]:
        state = super().head_state()
        if not self.info.options["is_v3"]:  # DINOv2's was not released, and stays what it is
            del state["logit_scale"]
        return state

    # --- vectors -----------------------------------------------------------------------------------------------------

    def encode_text(self, texts: str | Sequence[str] | Tensor, normalize: bool = False) -> Tensor:
        """Vectors of texts, [B, 2 C], on the device of the backbone.

        `texts`: one, or a list; or ids [B, N] of `tokenizer`, as Meta's code takes them, which keep gradients.
        `normalize`: to length 1, as cosines want them.

        Raises: InputError, InputTypeError; UnsupportedError where the extra `text` is not installed.
        """
        found = self.text_model(texts) if isinstance(texts, Tensor) else self._of_texts(texts)
        return F.normalize(found, dim=-1) if normalize else found

    @torch.no_grad()
    def _of_texts(self, texts: str | Sequence[str]) -> Tensor:
        ids = self.tokenizer(texts)
        if not len(ids):
            raise InputError("got no texts; give at least one")
        parts = []
        for some in ids.split(TEXTS):
            used = int(some.argmax(dim=-1).max()) + 1  # attention is causal: nothing depends on what follows the end
            parts.append(self.text_model(some[:, :used].to(self.backbone.device)))
        return torch.cat(parts)

    def encode_image(self, images: Images, normalize: bool = False) -> Tensor:
        """Vectors of images, [B, 2 C], on the device of the backbone.

        `images`: as in `extract_features`, prepared as Meta evaluates the head.  A float tensor [B, 3, H_px, W_px] is
        taken as normalised pixels, as Meta's code takes them, and keeps gradients.
        `normalize`: to length 1.

        Raises: as `extract_features`.
        """
        if isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point():
            return self.encode_image_with_patch_tokens(images, normalize)[0]
        batches, parts = [], []
        for image in each_image(images):
            batches.append(self.preprocess.batch([image]))
            if len(batches) == IMAGES:
                parts.append(_joined(*self._seen(batches)))
                batches = []
        if batches:
            parts.append(_joined(*self._seen(batches)))
        if not parts:
            raise InputError("got no images; give at least one")
        found = torch.cat(parts)
        return F.normalize(found, dim=-1) if normalize else found

    @torch.no_grad()
    def _seen(self, batches: Sequence[PixelBatch]) -> tuple[Tensor, Tensor]:
        """Class token [B, C] and patches [B, P, C] in the space of texts, of batches of one size."""
        each = [self.visual_model.tokens(found) for found in self.backbone.extractor.features(batches)]
        return torch.cat([cls_token for cls_token, _ in each]), torch.cat([patches for _, patches in each])

    def encode_labels(self, labels: Sequence[str], templates: str | Sequence[str] | None = None) -> Labels:
        """What `classify` and `segment` compare with; they take it in the place of names, so that it is computed once.

        `templates`: sentences with {} where the label goes; None for CLIP's 80, as Meta evaluates.  The vector of a
        label is the mean of those of its sentences, each of length 1.  A label takes as many passes as there are
        templates: on a CPU a single one, "a photo of a {}.", saves minutes.

        Raises: as `encode_text`; InputError for labels or templates that are none.
        """
        names = () if isinstance(labels, str) else tuple(labels)
        sentences = clip_templates() if templates is None else (templates,) if isinstance(templates, str) else templates
        if not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"labels are a list of names, such as ['cat', 'dog']; got {reprlib.repr(labels)}")
        if not sentences or not all(isinstance(one, str) and "{}" in one for one in sentences):
            raise InputError(
                f"templates have {{}} where the label goes, as 'a photo of a {{}}.' has; got {reprlib.repr(templates)}"
            )
        texts = [template.replace("{}", name) for name in names for template in sentences]
        whole, dense = [], []
        step = len(sentences) * max(1, TEXTS // len(sentences))
        for start in range(0, len(texts), step):
            vectors = self.encode_text(texts[start : start + step]).unflatten(0, (-1, len(sentences)))
            whole.append(_mean(vectors))
            dense.append(_mean(vectors[..., vectors.shape[-1] // 2 :]))
        return Labels(names, torch.cat(whole), torch.cat(dense))

    # --- tasks -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def classify(
        self,
        images: Images,
        labels: Sequence[str] | Labels,
        templates: str | Sequence[str] | None = None,
        top: int = 5,
    ) -> list[list[Guess]]:
        """The likeliest labels of each image, best first.

        `images`: as in `extract_features`, prepared as Meta evaluates the head.
        `labels`, `templates`: see `encode_labels`.
        `top`: how many of the labels.  Probabilities are those of 100 times the cosines, and of these labels only: some
        label is the likeliest, whatever the image shows.

        Raises: as `encode_image` and `encode_labels`.
        """
        if not isinstance(top, int) or top < 1:
            raise InputError(f"top is a number of labels from 1 on, got {top!r}")
        found = self._labels(labels, templates)
        logits = SCALE * self.encode_image(images, normalize=True) @ found.vectors.T
        best = logits.float().softmax(dim=-1).cpu().topk(min(top, len(found.names)), dim=-1)
        return [
            [Guess(label, found.names[label], p) for label, p in zip(numbers, values, strict=True)]
            for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def segment(
        self,
        images: Images,
        labels: Sequence[str] | Labels,
        templates: str | Sequence[str] | None = None,
        size: int = SHORT,
    ) -> list[SegmentMap]:
        """The likeliest label of every pixel of each image, at its own size.

        `images`: as in `extract_features`, each of any size.
        `labels`, `templates`: see `encode_labels`.  Every pixel gets one of them: name what is around things, too.

        `size`: pixels of the short side that the model sees; the long side has 2,048 at most.

        As Meta evaluates: windows of 384 pixels start every 192, and where they overlap the mean of their probabilities
        counts.

        Raises: as `extract_features` and `encode_labels`; InputError for a size that is none.
        """
        check_short_side(size, self.backbone.patch_size)
        found = self._labels(labels, templates)
        results = []
        for image in each_image(images):
            loaded = load_image(image, levels=self.preprocess.levels)
            height, width = loaded.shape[1:]
            own = replace(self.preprocess, size=_sides(height, width, size), fit="squash", resize_to=None, patch_size=1)
            pixels = own.batch([loaded]).pixels.to(self.backbone.device)
            scores = over_windows(pixels, WINDOW, STRIDE, lambda window: self._window(window, found.dense))
            results.append(SegmentMap(largest(scores[0], (height, width)).cpu(), found.names))
        return results

    def _window(self, pixels: Tensor, vectors: Tensor) -> Tensor:
        """Normalised pixels [1, 3, H_px, W_px] and labels [K, C] -> probabilities [1, K, H_px, W_px].

        Pixels are stretched to whole patches, as Meta's notebook does.
        """
        patch, seen = self.backbone.patch_size, pixels.shape[2:]
        h, w = (-(-side // patch) for side in seen)
        size = patch * h, patch * w
        if size != tuple(seen):
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        _, patches = self._seen([PixelBatch(pixels.contiguous(), (Placement(size, size, (0, 0, *size)),), None)])
        cosines = F.normalize(patches, dim=-1) @ vectors.to(patches).T
        return F.interpolate(as_map(cosines, (h, w)), size=seen, mode="bilinear", align_corners=False).softmax(dim=1)

    def _labels(self, labels: Sequence[str] | Labels, templates: str | Sequence[str] | None) -> Labels:
        return labels if isinstance(labels, Labels) else self.encode_labels(labels, templates)

    # --- Meta's calls ------------------------------------------------------------------------------------------------

    def encode_image_with_patch_tokens(self, pixels: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Of normalised pixels [B, 3, H_px, W_px]: vectors [B, 2 C], patches [B, P, C], the backbone's own patches."""
        cls_token, patches, own = self.visual_model.get_class_and_patch_tokens(pixels)
        found = _joined(cls_token, patches)
        return F.normalize(found, dim=-1) if normalize else found, patches, own

    def get_visual_class_and_patch_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Of normalised pixels [B, 3, H_px, W_px]: class token [B, C] and patches [B, P, C] in the space of texts."""
        return self.visual_model.get_class_and_patch_tokens(pixels)[:2]

    def get_logits(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines times exp(logit_scale): of images with texts [B, T], and of texts with images [T, B]."""
        vectors = self.encode_image_with_patch_tokens(pixels, normalize=True)[0]
        logits = self.logit_scale.exp() * vectors @ self.encode_text(ids, normalize=True).T
        return logits, logits.T

    def forward(self, pixels: Tensor, ids: Tensor) -> Any:
        """Vectors of images and texts, of length 1, and exp(logit_scale); of DINOv3 both kinds of patches, too."""
        vectors, *patches = self.encode_image_with_patch_tokens(pixels, normalize=True)
        found = (vectors, self.encode_text(ids, normalize=True), self.logit_scale.exp())
        return (*found, *patches) if self.info.options["is_v3"] else found


def _joined(cls_token: Tensor, patches: Tensor) -> Tensor:
    return torch.cat((cls_token, patches.mean(dim=1)), dim=-1)


def _mean(vectors: Tensor) -> Tensor:
    """[K, T, C] -> [K, C] of length 1: the mean of vectors that each had length 1."""
    return F.normalize(F.normalize(vectors, dim=-1).mean(dim=1), dim=-1)


def _sides(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) that an image is segmented at, rounded down as Meta's notebook does."""
    short, long = size, int(size * max(height, width) / min(height, width))
    if long > LONGEST:
        short, long = max(1, int(LONGEST * min(height, width) / max(height, width))), LONGEST
    return (short, long) if height <= width else (long, short)


@cache
def clip_templates() -> tuple[str, ...]:
    """The 80 sentences that CLIP was evaluated with on ImageNet, {} where the label goes."""
    return tuple(_TEMPLATES.read_text(encoding="utf-8").splitlines())
