"""Pictures in, named features out."""

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import Dinov3Error, InputError, InputTypeError, PrecisionError, check_choice
from ..images.decode import ImageLike
from ..images.opening import each_image, open_images
from ..images.preprocess import Fit, PixelBatch, Preprocess
from ..images.sources import Numbered, Source
from ..model.dispatch import Mode, Precision, compare, plan_of
from ..model.dropin import DropInTransformer
from ..model.introspection import Facet, attention_rows, facet_of
from ..model.vit import BackboneOutput, ViTConfig, resolve_layers
from .disk.recipe import Plan, Recipe, recipe_of
from .disk.target import Target
from .disk.write import Model, write
from .result import Features, Pooling, features_of
from .stream import MAX_TOKENS, Batcher, Decode, OnError, Reading, in_order, items_of
from .vectors import Asked, EmbedReport, Kind, OutDtype, Vector, collect, vectors_of

__all__ = ["FeatureExtractor"]

Pictures: TypeAlias = ImageLike | Iterable[ImageLike]
Collection: TypeAlias = Pictures | Source | Numbered


class _Options(TypedDict, total=False):
    size: int | tuple[int, int] | None
    fit: Fit | None
    pooling: Pooling
    num_workers: int | None


class _IterOptions(_Options, total=False):
    batch_size: int
    layers: int | Sequence[int] | None
    facet: Facet


class _EmbedOptions(_Options, total=False):
    kind: Kind
    normalize: bool
    out_dtype: OutDtype
    decode: Decode
    batch_size: int | None
    shard_size: int | None
    on_error: Literal["raise", "skip"]
    overwrite: bool
    progress: bool | None


class FeatureExtractor(DropInTransformer):
    """A vision transformer that knows the transform of its pictures."""

    def __init__(self, config: ViTConfig, preprocess: Preprocess) -> None:
        super().__init__(config)
        self.preprocess = preprocess
        self.mode: Mode = "exact"  # on a CPU, see `from_pretrained`
        self.mixed_precision = True  # on CUDA the matrix work of float32 weights is done in bfloat16

    def extract_features(
        self,
        images: Pictures,
        size: int | tuple[int, int] | None = None,
        fit: Fit | None = None,
        layers: int | Sequence[int] | None = None,
        pooling: Pooling = "cls",
        facet: Facet = "token",
    ) -> Features:
        """Features of one picture or a batch of pictures; a single one gives a batch of 1.

        `images`: path, address, bytes, PIL image, array [H_px, W_px, 3], tensor [3, H_px, W_px] (RGB, uint8 or float in
        0..1), a list of these, or a 4-dimensional batch.
        `size`: pixels.  The side for fit "squash", the short side for "crop", the long side for "pad" and "native".
        `fit`: "squash" to a square, "crop" the centre, "pad" to a square (see `valid`), "native" keeps the aspect.
        `layers`: an int for the last n blocks, a list for these; results are in `.layers`, after the final norm.
        `pooling`: what `.embedding` is: "cls", "mean" of the patches, or "cls_mean", both in a row.
        `facet`: what `.layers` are: the tokens, or the "query", "key" or "value" of each block: the output of its qkv
        layer, heads side by side, without the rotation that DINOv3 applies after it, which depends on the position.

        Raises: ImageError, MissingFileError, InputError, LayerError; PrecisionError where the features are not finite.
        """
        blocks = self._blocks(layers, pooling, facet)
        batch = self.preprocess.with_options(size, fit).batch(each_image(images))
        return self._features([batch], blocks, pooling, facet)[0]

    @overload
    def iter_features(
        self, images: Pictures | Source, *, on_error: Literal["raise"] = ..., **options: Unpack[_IterOptions]
    ) -> Iterator[Features]: ...
    @overload
    def iter_features(
        self, images: Pictures | Source, *, on_error: Literal["return"], **options: Unpack[_IterOptions]
    ) -> Iterator[Features | Dinov3Error]: ...
    @overload
    def iter_features(
        self, images: Pictures | Source, *, on_error: OnError, **options: Unpack[_IterOptions]
    ) -> Iterator[Features | Dinov3Error | None]: ...
    def iter_features(
        self,
        images: Pictures | Source,
        *,
        size: int | tuple[int, int] | None = None,
        fit: Fit | None = None,
        layers: int | Sequence[int] | None = None,
        pooling: Pooling = "cls",
        facet: Facet = "token",
        batch_size: int = 32,
        num_workers: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[Features | Dinov3Error | None]:
        """One `Features` per picture, of any sizes, in the order of the input, on the CPU.

        `images`: as in `extract_features`, or any iterable of pictures, a folder or a pattern (see `list_images`).
        `batch_size`: pictures of one pass at most; large ones go in smaller passes.  It does not change the features.
        `num_workers`: threads that read pictures; None for as many as torch has on a CPU, and up to 8 beside a GPU.
        `on_error`: for a picture that cannot be read "raise" its error, "return" it in its place, or "skip", which
        gives None and logs why.

        Raises: as `extract_features`.
        """
        blocks = self._blocks(layers, pooling, facet)
        check_choice("on_error", on_error, OnError)
        transform = self.preprocess.with_options(size, fit)
        forward = partial(self._on_cpu, blocks=blocks, pooling=pooling, facet=facet)
        batcher = Batcher(transform, forward, batch_size, self._max_tokens(), self._reading(num_workers))
        return in_order(batcher(items_of(images if isinstance(images, Source) else each_image(images))), on_error)

    @overload
    def embed(self, images: Collection, out: None = None, **options: Unpack[_EmbedOptions]) -> np.ndarray[Any, Any]: ...
    @overload
    def embed(
        self, images: Collection, out: str | os.PathLike[str], **options: Unpack[_EmbedOptions]
    ) -> EmbedReport: ...
    def embed(
        self,
        images: Collection,
        out: str | os.PathLike[str] | None = None,
        *,
        kind: Kind = "embedding",
        pooling: Pooling = "cls",
        normalize: bool = False,
        out_dtype: OutDtype = "float32",
        size: int | tuple[int, int] | None = None,
        fit: Fit | None = None,
        decode: Decode = "exact",
        batch_size: int | None = None,
        shard_size: int | None = None,
        num_workers: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> np.ndarray[Any, Any] | EmbedReport:
        """One row per picture in the order of the input: an array, or the file or folder `out` and a report.

        `images`: as in `iter_features`; also a list file, tar archive, Parquet table or Dataset (see `as_source`).
        `out`: .npy or .safetensors, beside which goes a .jsonl with row, path, grid and error of every picture, or
        .parquet with all in one; a name without suffix, or with a slash behind it, is a folder of such files.  What is
        there of the same call is kept, what is missing is added; under torchrun each process writes a part of a folder.
        `kind`: "embedding" [N, C] ([N, 2C] with pooling "cls_mean"), "patches" [N, P, C], or "map" [N, C, h, w].
        `normalize`: every vector to length 1, for cosine similarity by dot product.
        `decode`: "fast" lets a JPEG's decoder make large photographs smaller, which changes vectors a little.
        `batch_size`: pictures of one pass; None for what is found to be fastest.  It does not change vectors.
        `shard_size`: pictures that are written at a time; None for 10,000, or as many as have 256 MiB.
        `num_workers`, `size`, `fit`: as in `iter_features`.
        `on_error`: "raise", or "skip", which leaves a row of NaN for a picture that cannot be read.
        `overwrite`: begin anew, whatever is there.
        `progress`: a bar on stderr; None shows it where that is a terminal.

        Raises: as `iter_features`; InputError where patches or maps differ in shape, or where what is at `out` was made
        in another way or from other pictures.
        """
        check_choice("on_error", on_error, ("raise", "skip"))
        asked = Asked(
            kind=kind, pooling=pooling, normalize=normalize, out_dtype=out_dtype, size=size, fit=fit, decode=decode,
            batch_size=batch_size, shard_size=shard_size, num_workers=num_workers,
        )  # fmt: skip
        target = None if out is None else Target.find(out, overwrite)
        model, raises, pictures = self._model(asked), on_error == "raise", open_images(images)
        if target is not None:
            recipe = self._recipe(asked, pictures)
            return write(target, pictures, recipe, model, raises=raises, progress=progress, overwrite=overwrite)
        batcher = model.batcher(Plan(batch_size=batch_size or 32), halves=True)
        width = self.embed_dim * (2 if pooling == "cls_mean" else 1)
        total = len(pictures) if isinstance(pictures, Sized) else None
        return collect(
            batcher(items_of(pictures)), kind, width, out_dtype=out_dtype, raises=raises, total=total, progress=progress
        )

    def attention_maps(
        self,
        images: Pictures,
        layer: int = -1,
        query: Literal["cls"] | tuple[float, float] = "cls",
        size: int | tuple[int, int] | None = 768,
        fit: Fit | None = "native",
    ) -> Tensor:
        """How much a token attends to each patch, [B, H, h, w], one map per head.

        The softmax runs over all tokens, so a map sums to what class token and registers leave of 1.
        `layer`: a block from 0, or from the end.
        `query`: "cls", or a point (x, y) in pixels of the original picture for the patch that covers it.

        Raises: as `extract_features`; InputError for a point that is outside the picture or cropped away.
        """
        if not hasattr(layer, "__index__"):
            raise InputTypeError(f"layer is the number of one block, got {layer!r}; call it once for each")
        (block,) = resolve_layers([layer], self.config.depth)
        batch = self.preprocess.with_options(size, fit).batch(each_image(images))
        grid = self.grid_of(batch.pixels)
        token = [0] * len(batch.placements)
        if query != "cls":
            x, y = _point(query)
            patches = (placement.to_patch(x, y, grid) for placement in batch.placements)
            token = [self.config.num_prefix + row * grid[1] + column for row, column in patches]
        with self._inference():
            rows = attention_rows(self, batch.pixels.to(self.device), block, torch.tensor(token))
        self._check_finite(rows)
        return rows[:, :, 0, self.config.num_prefix :].unflatten(-1, grid)  # type: ignore[no-any-return]

    def check_precision(
        self, images: Pictures, size: int | tuple[int, int] | None = None, fit: Fit | None = None
    ) -> Precision:
        """How near the features of these pictures are to those of the model as it is written, in plain float32.

        This is for models that run faster at some cost: with `mode="fast"` or "int8" on a CPU, or in bfloat16 on CUDA.

        Raises: as `extract_features`.
        """
        batch = self.preprocess.with_options(size, fit).batch(each_image(images))
        pixels = batch.pixels.to(self.device)
        with self._inference():
            plan = plan_of(self, self.mode, self._samples)
            (found,) = plan(self, [pixels]) if plan is not None else [self(pixels, layers=[])]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return compare(found, self(pixels, layers=[]))

    # --- how -----------------------------------------------------------------------------------------------------

    def _blocks(self, layers: int | Sequence[int] | None, pooling: str, facet: str) -> list[int]:
        """The layers asked for; wrong options are refused before a picture is read."""
        check_choice("pooling", pooling, Pooling)
        check_choice("facet", facet, Facet)
        blocks = resolve_layers(layers, self.config.depth)
        if facet != "token" and not blocks:
            raise InputError(f"facet={facet!r} is that of layers; say which, e.g. layers=[-1]")
        return blocks

    def _model(self, asked: Asked) -> Model:
        transform = self.preprocess.with_options(asked.size, asked.fit)
        forward = partial(self._vectors, kind=asked.kind, pooling=asked.pooling, normalize=asked.normalize)
        return Model(transform, forward, self._reading(asked.num_workers, asked.decode), self._max_tokens())

    def _recipe(self, asked: Asked, pictures: Source | Iterable[ImageLike]) -> Recipe:
        """Takes a while: all weights and all names are hashed."""
        transform = self.preprocess.with_options(asked.size, asked.fit)
        return recipe_of(self, pictures, transform, asked, self._products())

    def _reading(self, num_workers: int | None, decode: Decode = "exact") -> Reading:
        on_cpu = self.device.type == "cpu"
        if num_workers is None:
            threads = torch.get_num_threads() if on_cpu else min(8, os.cpu_count() or 1)
            num_workers = threads if threads > 1 else 0
        return Reading(num_workers, ahead=not on_cpu, decode=decode)

    def _max_tokens(self) -> int:
        return MAX_TOKENS["cpu" if self.device.type == "cpu" else "cuda"]

    def _on_cpu(
        self, batches: list[PixelBatch], blocks: list[int], pooling: Pooling, facet: Facet
    ) -> list[Sequence[Features]]:
        return [list(features.to("cpu")) for features in self._features(batches, blocks, pooling, facet)]

    def _vectors(
        self, batches: list[PixelBatch], kind: Kind, pooling: Pooling, normalize: bool
    ) -> list[Sequence[Vector]]:
        return [vectors_of(features, kind, normalize) for features in self._features(batches, [], pooling, "token")]

    def _features(self, batches: list[PixelBatch], blocks: list[int], pooling: Pooling, facet: Facet) -> list[Features]:
        """One batch per size, in one pass where the model can."""
        pixels = [batch.pixels.to(self.device) for batch in batches]
        with self._inference():
            if facet == "token" and (plan := plan_of(self, self.mode, self._samples)) is not None:
                outputs = plan(self, pixels, blocks)
            elif facet != "token":
                outputs = [self._with_facet(p, blocks, facet) for p in pixels]
            elif len(pixels) == 1 or self.training:  # whose packed pass norms all but its first size otherwise
                outputs = [self(p, layers=blocks) for p in pixels]
            else:
                outputs = self.forward_packed(pixels, layers=blocks)
        found = [features_of(o, b, self.patch_size, pooling) for o, b in zip(outputs, batches, strict=True)]
        self._check_finite(*(t for f in found for t in (f.cls_token, f.patch_tokens, f.register_tokens)))
        return found

    def _with_facet(self, pixels: Tensor, blocks: list[int], facet: Facet) -> BackboneOutput:
        last, taken = self.run_blocks(pixels, indices=[block - 1 for block in blocks])
        layers = tuple(facet_of(self, taken[block - 1], block, facet) for block in blocks)
        return BackboneOutput(*self.split(self.normed(last)), layers)

    def _samples(self) -> Tensor:
        """Pixels of the pictures that come with the package."""
        pictures = Path(__file__).parent.parent / "data" / "samples"
        return self.preprocess.batch([pictures / f"{name}.png" for name in ("cat", "coffee", "rocket")]).pixels

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocasts()):
            yield

    def _autocasts(self) -> bool:
        weight = self.patch_embed.proj.weight
        mixed = self.mixed_precision and weight.is_cuda and weight.dtype == torch.float32
        return bool(mixed) and torch.cuda.is_bf16_supported()

    def _products(self) -> str:
        """What vectors depend on beside the dtype of the parameters."""
        if self._autocasts():
            return ", products in bfloat16"
        if self.mode == "exact" or self.device.type != "cpu":
            return ""
        with self._inference():  # the plan knows whether another mode had to take its place
            plan = plan_of(self, self.mode, self._samples)
        return "" if plan is None or plan.mode == "exact" else f", mode {plan.mode}"

    def _check_finite(self, *tensors: Tensor) -> None:
        """Never NaN without a word."""
        if all(bool(t.isfinite().all()) for t in tensors):
            return
        dtype = torch.bfloat16 if self._autocasts() else self.patch_embed.proj.weight.dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise PrecisionError(
                f"the features are not finite in {dtype}: activations left its range; load with dtype=torch.float32"
            )
        raise PrecisionError("the features are not finite: the weights hold NaN or infinity; load another checkpoint")


def _point(query: Any) -> tuple[float, float]:
    try:
        x, y = query
        return float(x), float(y)
    except (TypeError, ValueError):
        raise InputError(f"query is 'cls' or a point (x, y) in pixels, got {query!r}") from None
