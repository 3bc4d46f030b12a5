"""Batches of pixels through a network: with its plan or without, in its precision, and never NaN without a word."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, PrecisionError, UnsupportedError, check_choice
from ..images.preprocess import Fit, PixelBatch, Preprocess
from ..model.chips import lacks_bfloat16
from ..model.dispatch import Mode, Precision, compare, plan_of
from ..model.introspection import Facet, attention_rows, with_facet
from ..model.network import BackboneOutput, Network, resolve_layers
from ..model.vit import VisionTransformer
from .result import Features, Pooling, features_of
from .stream import MAX_TOKENS, Batcher, Decode, Reading, T

__all__ = ["Extractor"]

_SAMPLES = Path(__file__).parent.parent / "data" / "samples"


@dataclass(frozen=True)
class Extractor:
    """A network as features are computed with it."""

    network: Network
    preprocess: Preprocess
    mode: Mode  # on a CPU, see `Backbone.from_pretrained`
    mixed_precision: bool  # on CUDA the matrix work of float32 weights is done in bfloat16

    def layers(self, layers: int | Sequence[int] | None, pooling: str, facet: str) -> list[int]:
        """The numbers of the layers asked for; wrong options are refused before an image is read."""
        check_choice("pooling", pooling, Pooling)
        check_choice("facet", facet, Facet)
        found = resolve_layers(layers, self.network.n_blocks)
        if facet != "token" and not found:
            raise InputError(f"facet={facet!r} is that of layers; say which, e.g. layers=[-1]")
        return found

    def transform(self, size: int | tuple[int, int] | None, fit: Fit | None) -> Preprocess:
        """The transform with another size or fit.  Raises: UnsupportedError for padding that the network would see."""
        found = self.preprocess.with_options(size, fit)
        if found.fit == "pad" and (reason := self.network.why_not_padded) is not None:
            raise UnsupportedError(f"fit='pad' is not for this network: {reason}; use 'native', 'crop' or 'squash'")
        return found

    def features(
        self,
        batches: Sequence[PixelBatch],
        layers: Sequence[int] = (),
        pooling: Pooling = "cls",
        facet: Facet = "token",
    ) -> list[Features]:
        """One for each batch; all of them in one pass where the network can."""
        pixels = [batch.pixels.to(self.network.device) for batch in batches]
        with self._inference():
            outputs = self._outputs(pixels, layers, facet)
        found = []
        for output, batch in zip(outputs, batches, strict=True):
            grids = [self.network.grid_of(batch.pixels, layer) for layer in (-1, *layers)]
            found.append(features_of(output, batch, grids, pooling))
        self._check_finite(*(t for f in found for t in (f.cls_token, f.patch_tokens, f.register_tokens)))
        return found

    def _outputs(self, pixels: list[Tensor], layers: Sequence[int], facet: Facet) -> list[BackboneOutput]:
        if facet != "token":
            vit = self._transformer(f"facet={facet!r}")
            return [with_facet(vit, p, layers, facet) for p in pixels]
        plan = plan_of(self.network, self.mode, self.samples)
        if plan is None:
            return self.network.forward_sizes(pixels, layers)
        return plan(self.network, pixels, layers)  # type: ignore[arg-type]  # it was made for this network

    def attention_maps(
        self,
        batch: PixelBatch,
        block: int,  # from 0
        query: tuple[float, float] | None,  # (x, y) in pixels of the original image; None: the class token
    ) -> Tensor:
        """[B, H, h, w], see `Backbone.attention_maps`."""
        vit = self._transformer("an attention map")
        grid, prefix = vit.grid_of(batch.pixels), vit.num_prefix_tokens
        tokens = [0] * len(batch.placements)
        if query is not None:
            patches = (placement.to_patch(*query, grid) for placement in batch.placements)
            tokens = [prefix + row * grid[1] + column for row, column in patches]
        with self._inference():
            rows = attention_rows(vit, batch.pixels.to(vit.device), block, torch.tensor(tokens))
        self._check_finite(rows)
        return rows[:, :, 0, prefix:].unflatten(-1, grid)  # type: ignore[no-any-return]

    def precision(self, batch: PixelBatch) -> Precision:
        """How near the tokens of a batch are to those of the plain network in float32."""
        pixels = batch.pixels.to(self.network.device)
        with self._inference():
            (found,) = self._outputs([pixels], [], "token")
        with torch.no_grad(), torch.autocast(self.network.device.type, enabled=False):
            return compare(found, self.network(pixels, layers=[]))

    def batcher(
        self,
        transform: Preprocess,
        forward: Callable[[list[PixelBatch]], list[Sequence[T]]],
        batch_size: int,
        *,
        num_workers: int | None = None,
        decode: Decode = "exact",
        max_tokens: int | None = None,
        shard_size: int | None = None,
        halves: bool = True,
    ) -> Batcher[T]:
        """A stream of images through `forward`, read by as many threads as this device is good for."""
        reading = self.reading(num_workers, decode)
        return Batcher(transform, forward, batch_size, max_tokens or self.max_tokens, reading, shard_size, halves)

    def reading(self, num_workers: int | None, decode: Decode = "exact") -> Reading:
        """How images become pixels beside this network."""
        on_cpu = self.network.device.type == "cpu"
        if num_workers is None:
            threads = torch.get_num_threads() if on_cpu else min(8, os.cpu_count() or 1)
            num_workers = threads if threads > 1 else 0
        return Reading(num_workers, ahead=not on_cpu, decode=decode)

    @property
    def max_tokens(self) -> int:
        """Of one pass."""
        return MAX_TOKENS["cpu" if self.network.device.type == "cpu" else "cuda"]

    @property
    def arithmetic(self) -> str:
        """The dtype of the parameters, and what the products are computed in where that differs."""
        dtype = str(self.network.main_weight.dtype).removeprefix("torch.")
        if self._autocasts():
            return f"{dtype}, products in bfloat16"
        if self.mode in ("exact", "plain") or self.network.device.type != "cpu":
            return dtype
        with self._inference():  # the plan knows whether another mode had to take its place
            plan = plan_of(self.network, self.mode, self.samples)
        return dtype if plan is None or plan.mode == "exact" else f"{dtype}, mode {plan.mode}"

    def samples(self) -> Tensor:
        """Pixels of the images that come with the package, [3, 3, H_px, W_px]."""
        return self.preprocess.batch([_SAMPLES / f"{name}.png" for name in ("cat", "coffee", "rocket")]).pixels

    def _transformer(self, what: str) -> VisionTransformer:
        if not isinstance(self.network, VisionTransformer):
            raise UnsupportedError(f"{what} needs attention, which this network has not; ask for layers= instead")
        return self.network

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.network.device.type, torch.bfloat16, enabled=self._autocasts()):
            yield

    def _autocasts(self) -> bool:
        weight = self.network.main_weight
        mixed = self.mixed_precision and weight.is_cuda and weight.dtype == torch.float32
        return mixed and not lacks_bfloat16(weight.device)

    def _check_finite(self, *tensors: Tensor) -> None:
        if all(bool(t.isfinite().all()) for t in tensors):
            return
        dtype = torch.bfloat16 if self._autocasts() else self.network.main_weight.dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise PrecisionError(
                f"the features are not finite in {dtype}: activations left its range; load with dtype=torch.float32"
            )
        raise PrecisionError("the features are not finite: the weights hold NaN or infinity; load another checkpoint")
