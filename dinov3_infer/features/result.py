"""The results of `extract_features` (named tokens, their grid, positions in the original image) and of `embed`."""

import base64
import io
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError, InputTypeError, check_choice
from ..images.preprocess import PixelBatch, Placement
from ..model.network import BackboneOutput, all_tokens, as_map, shapes
from .components import colours, project

__all__ = [
    "EmbedReport",
    "Failure",
    "Features",
    "Kind",
    "LayerFeatures",
    "OutDtype",
    "Pooling",
    "features_of",
    "pool",
    "pooled_width",
]

Pooling = Literal["cls", "mean", "cls_mean"]
Kind = Literal["embedding", "patches", "map"]  # of the rows that `embed` writes
OutDtype = Literal["float32", "float16"]
_TOKENS = ("cls_token", "register_tokens", "patch_tokens")
_NAMES = ("embedding", *_TOKENS, "feature_map")
_SHOWN = 8  # number of images that a notebook shows


def pool(
    cls_token: Tensor,  # [B, C]
    patch_tokens: Tensor,  # [B, P, C]
    pooling: Pooling,
    valid: Tensor | None = None,  # [B, h, w] bool
) -> Tensor:
    """Pools tokens into [B, C], or [B, 2C] for "cls_mean" with the class token first; the mean covers patches that are
    not padding, and no registers.

    Raises: InputError for another `pooling`.
    """
    check_choice("pooling", pooling, Pooling)
    if pooling == "cls":
        return cls_token
    if valid is None:
        mean = patch_tokens.mean(dim=1)
    else:
        weights = valid.flatten(1).to(patch_tokens)[..., None]
        mean = (patch_tokens * weights).sum(dim=1) / weights.sum(dim=1)
    return mean if pooling == "mean" else torch.cat((cls_token, mean), dim=-1)


def pooled_width(width: int, pooling: Pooling) -> int:
    """Length of the vector that `pool` makes from tokens of length `width`."""
    return width * (2 if pooling == "cls_mean" else 1)


@dataclass(frozen=True, repr=False, eq=False)
class LayerFeatures:
    """One layer: its tokens after the final norm, or its queries, keys or values (see `extract_features`)."""

    cls_token: Tensor  # [B, C]
    register_tokens: Tensor  # [B, R, C]
    patch_tokens: Tensor  # [B, P, C]
    grid: tuple[int, int]  # (h, w) in patches

    @property
    def feature_map(self) -> Tensor:
        """[B, C, h, w], a view of the patch tokens."""
        return as_map(self.patch_tokens, self.grid)

    def __repr__(self) -> str:
        return f"LayerFeatures({shapes(self, (*_TOKENS, 'feature_map'))}, grid {self.grid})"

    def __eq__(self, other: object) -> bool:
        return _same(self, other, _TOKENS) if isinstance(other, LayerFeatures) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equal by value, and tensors can change


@dataclass(frozen=True, repr=False, eq=False)
class Features:
    """Features of a batch of images, float32, after the final norm.

    A notebook shows a table of the shapes and the principal components of the first images in colours.

    Example:
        >>> f = bb.extract_features(["cat.jpg", "dog.jpg"])
        >>> f.embedding.shape, np.asarray(f).shape, f[1].embedding.shape
        (torch.Size([2, 192]), (2, 192), torch.Size([1, 192]))
        >>> f == bb.extract_features(["cat.jpg", "dog.jpg"])
        True
    """

    embedding: Tensor  # [B, C], or [B, 2C] with pooling "cls_mean": one vector per image
    cls_token: Tensor  # [B, C]
    register_tokens: Tensor  # [B, R, C]
    patch_tokens: Tensor  # [B, P, C], row-major
    grid: tuple[int, int]  # (h, w) in patches
    placements: tuple[Placement, ...]  # where each image lies in the input
    valid: Tensor | None = None  # [B, h, w] bool: False for padding; None if there is no padding
    layers: tuple[LayerFeatures, ...] = ()  # in the order of `layers=`

    @property
    def feature_map(self) -> Tensor:
        """[B, C, h, w], a view of the patch tokens."""
        return as_map(self.patch_tokens, self.grid)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the model input."""
        return self.placements[0].window[2:]

    @property
    def original_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of each image, after EXIF rotation."""
        return tuple(placement.original for placement in self.placements)

    @property
    def last_hidden_state(self) -> Tensor:
        """All tokens under transformers' name: class token, registers, patches, [B, N, C]."""
        return all_tokens(self.cls_token, self.register_tokens, self.patch_tokens)

    @property
    def pooler_output(self) -> Tensor:
        """The class token under transformers' name, [B, C]."""
        return self.cls_token

    def __repr__(self) -> str:
        return f"Features({shapes(self, _NAMES)}, grid {self.grid}, {len(self.layers)} layers)"

    def _repr_html_(self) -> str:
        """A table of shapes, with the first images coloured by principal components, for notebooks."""
        rows = [(name, str(list(getattr(self, name).shape))) for name in _NAMES]
        rows += [("grid", str(self.grid)), ("layers", str(len(self.layers)))]
        if min(self.grid) * len(self) >= 3 and self.patch_tokens.isfinite().all():
            shown = self.patch_tokens[:_SHOWN].detach().cpu().float()
            pixels = colours(project(shown.flatten(0, 1), 3)).reshape(len(shown), *self.grid, 3)
            rows.append(("PCA", "".join(_thumbnail(one) for one in pixels)))
        cells = "".join(f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in rows)
        return f"<table>{cells}</table>"

    def __eq__(self, other: object) -> bool:
        """Whether all tensors and placements are equal."""
        if not isinstance(other, Features):
            return NotImplemented
        return (
            _same(self, other, ("embedding", *_TOKENS))
            and self.placements == other.placements
            and ((self.valid is None) == (other.valid is None))
            and (self.valid is None or torch.equal(self.valid, other.valid))  # type: ignore[arg-type]
            and self.layers == other.layers
        )

    __hash__ = None  # type: ignore[assignment]  # equal by value, and tensors can change

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The embedding [B, C], for `np.asarray(features)`; `numpy()` gives every tensor."""
        found: np.ndarray = self.embedding.detach().cpu().numpy()
        return found.astype(dtype or found.dtype, copy=bool(copy))

    def __len__(self) -> int:
        return len(self.placements)

    def __getitem__(self, index: int) -> "Features":
        """The features of image number `index`, a batch of 1 that is a copy, so that the batch can be freed.

        Raises: InputError for a number that does not exist, InputTypeError if `index` is not a whole number.
        """
        number = self._number(index)
        return replace(self._each(lambda t: t[number : number + 1].clone()), placements=(self.placements[number],))

    def __iter__(self) -> Iterator["Features"]:
        return (self[i] for i in range(len(self)))

    def to(self, device: str | torch.device, non_blocking: bool = False) -> "Features":
        """The same features on another device; `non_blocking` as in `Tensor.to`."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Features":
        def changed(part: Any, *names: str) -> dict[str, Any]:
            return {name: change(getattr(part, name)) for name in names}

        layers = tuple(replace(layer, **changed(layer, *_TOKENS)) for layer in self.layers)
        valid = None if self.valid is None else change(self.valid)
        return replace(self, **changed(self, "embedding", *_TOKENS), valid=valid, layers=layers)

    def _number(self, index: int) -> int:
        if not hasattr(index, "__index__"):
            raise InputTypeError(
                f"features are indexed by a whole number, got {type(index).__name__}; use [f[i] for i in numbers]"
            )
        if not -len(self) <= index < len(self):
            raise InputError(f"image number {index} does not exist; this batch has {len(self)}, numbered from 0")
        return operator.index(index) % len(self)

    def to_patch(self, x: float, y: float, index: int = 0) -> tuple[int, int]:
        """The patch (row, column) that covers pixel (x, y) of original image number `index`.

        Raises: InputError for a point outside the image, or in a part that was cropped away.
        """
        return self.placements[self._number(index)].to_patch(x, y, self.grid)

    def normalize(self) -> "Features":
        """The same features with each embedding scaled to length 1, for cosine similarity by dot product."""
        return replace(self, embedding=torch.nn.functional.normalize(self.embedding, dim=-1))

    def similarity(self, other: "Features") -> Tensor:
        """Cosine similarity of each embedding with each embedding of `other`, [B, B of other].

        Raises: InputTypeError if `other` is not Features, InputError if the embeddings differ in length.
        """
        if not isinstance(other, Features):
            raise InputTypeError(
                f"similarity() compares Features with Features, got {type(other).__name__}; use extract_features()"
            )
        if other.embedding.shape[-1] != self.embedding.shape[-1]:
            widths = f"{self.embedding.shape[-1]} and {other.embedding.shape[-1]}"
            raise InputError(f"embeddings of length {widths} cannot be compared; use one model and one pooling")
        return self.normalize().embedding @ other.normalize().embedding.to(self.embedding.device).T

    def numpy(self) -> dict[str, Any]:
        """All tensors as float32 arrays on the CPU, in a dict by name.

        `layers` is a list of such dicts.  `layers` and `valid` are missing if there are none.
        """

        def arrays(part: Any, *names: str) -> dict[str, Any]:
            return {name: getattr(part, name).detach().cpu().numpy() for name in names}

        found = arrays(self, *_NAMES)
        if self.valid is not None:
            found |= arrays(self, "valid")
        return found | {"layers": [arrays(layer, *_NAMES[1:]) for layer in self.layers]} if self.layers else found


def _same(one: Any, other: Any, names: Sequence[str]) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    same = all(a.device == b.device and torch.equal(a, b) for a, b in pairs)
    return same and bool(one.grid == other.grid)


def _thumbnail(pixels: np.ndarray) -> str:  # [h, w, 3] uint8
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    data = base64.b64encode(packed.getvalue()).decode()
    return f'<img style="height: 96px; image-rendering: pixelated" src="data:image/png;base64,{data}">'


def features_of(
    output: BackboneOutput,
    batch: PixelBatch,
    grids: Sequence[tuple[int, int]],  # (h, w) in patches of the last layer, then of each layer asked for
    pooling: Pooling,
) -> Features:
    """Converts the output for a batch of images to `Features` in float32."""
    cls_token, registers, patches = (t.float() for t in output[:3])
    valid = batch.valid.to(patches.device) if batch.valid is not None else None
    return Features(
        embedding=pool(cls_token, patches, pooling, valid),
        cls_token=cls_token,
        register_tokens=registers,
        patch_tokens=patches,
        grid=grids[0],
        placements=batch.placements,
        valid=valid,
        layers=tuple(
            LayerFeatures(cls.float(), registers.float(), patches.float(), grid)
            for (cls, registers, patches), grid in zip(output.layers, grids[1:], strict=True)
        ),
    )


@dataclass(frozen=True)
class Failure:
    """An image that could not be read."""

    row: int
    path: str | None  # None for an image that is an object in memory
    error: str


@dataclass(frozen=True)
class EmbedReport:
    """What `embed` wrote."""

    path: Path  # the file, with one row per image, or the folder of shards
    shape: tuple[int, ...]  # of all rows; (N,) if the rows differ in shape
    failures: tuple[Failure, ...]  # their rows are NaN
    batch_size: int  # at the end; smaller than asked for if memory ran out
    resumed: int  # rows that an earlier run wrote
    changed: int = 0  # rows computed again because their source changed
    retried: int = 0  # rows that had failed and were tried again
