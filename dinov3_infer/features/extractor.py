"""Batches of pixels through a network: plan or plain modules, the precision, and the check for NaN."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, PrecisionError, UnsupportedError, check_choice
from ..images.decode import ImageLike, load_image
from ..images.levels import Levels
from ..images.preprocess import Fit, PixelBatch, Preprocess
from ..model.chips import lacks_bfloat16
from ..model.dispatch import Mode, Plan, Precision, Request, compare, plan_of, warm, why_not_plan
from ..model.introspection import Facet, attention_rows, with_facet
from ..model.network import Network, Outputs, Scale, normalised, resolve_layers
from ..model.vit import VisionTransformer
from .result import Features, Pooling, features_of
from .stream import MAX_TOKENS, Batcher, Decode, Launch, Reading, T

__all__ = ["Extractor"]

_SAMPLES = Path(__file__).parent.parent / "data" / "samples"


@dataclass(frozen=True)
class Extractor:
    """A network with its image transform and the settings of its arithmetic."""

    network: Network
    preprocess: Preprocess
    mode: Mode  # on a CPU, see `Backbone.from_pretrained`
    mixed_precision: bool  # on CUDA, matrix products with float32 weights run in bfloat16

    def layers(self, layers: int | Sequence[int] | None, pooling: str, facet: str) -> list[int]:
        """The numbers of the layers that `layers` asks for.

        Raises: InputError for a wrong option, before an image is read; LayerError for a layer that does not exist.
        """
        check_choice("pooling", pooling, Pooling)
        check_choice("facet", facet, Facet)
        found = resolve_layers(layers, self.network.n_blocks)
        if facet != "token" and not found:
            raise InputError(f"facet={facet!r} needs layers=, for example layers=[-1]")
        return found

    def transform(
        self, size: int | tuple[int, int] | None, fit: Fit | None, levels: Levels | None = None
    ) -> Preprocess:
        """The transform with another size, fit or levels.

        Raises: UnsupportedError for fit "pad" with a network that cannot leave out padding.
        """
        found = self.preprocess.with_options(size, fit, levels)
        if found.fit == "pad" and (reason := self.network.why_not_padded) is not None:
            raise UnsupportedError(
                f"fit='pad' does not work with this network: {reason}; use 'native', 'crop' or 'squash'"
            )
        return found

    def batch(self, transform: Preprocess, images: Iterable[ImageLike]) -> PixelBatch:
        """Makes one batch from images that have one size after the transform, for the device of the network."""
        return transform.batch(images, for_gpu=self.on_gpu)

    def features(
        self,
        batches: Sequence[PixelBatch],
        layers: Sequence[int] = (),
        pooling: Pooling = "cls",
        facet: Facet = "token",
    ) -> list[Features]:
        """One `Features` per batch; the batches share one pass if the network can run several sizes at once.

        Raises: as `launched` and `check_finite`.
        """
        found, total = self.launched(batches, layers, pooling, facet)
        self.check_finite(total)
        return found

    def launched(
        self,
        batches: Sequence[PixelBatch],
        layers: Sequence[int] = (),
        pooling: Pooling = "cls",
        facet: Facet = "token",
        class_only: bool = False,  # True allows register and patch tokens without rows
    ) -> tuple[list[Features], Tensor]:
        """Starts what `features` computes; a GPU may still be running when this returns.

        Returns the `Features`, and the sum of all tokens [] for `check_finite`.

        Raises: UnsupportedError for a facet of a network without attention.
        """
        pixels = [batch.pixels.to(self.network.device, non_blocking=True) for batch in batches]
        with self._inference():
            outputs = self._outputs(pixels, layers, facet, class_only)
            found = []
            for output, batch in zip(outputs, batches, strict=True):
                found.append(features_of(output, batch, self._grids(batch, layers), pooling))
            total = outputs.total
            if total is None:
                each = (t.sum() for f in found for t in (f.cls_token, f.patch_tokens, f.register_tokens))
                total = torch.stack(list(each)).sum()
        return found, total

    def landing(self) -> Callable[[], None]:
        """A function that waits for the GPU work queued up to now, and not for later work."""
        if not self.on_gpu:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def _outputs(self, pixels: list[Tensor], layers: Sequence[int], facet: Facet, class_only: bool = False) -> Outputs:
        """`pixels`: per batch [B, 3, H_px, W_px], uint8, or float and normalised."""
        if facet != "token":
            vit = self._transformer(f"facet={facet!r}")
            return Outputs([with_facet(vit, normalised(p, self.scale), layers, facet) for p in pixels])
        plan = self.plan(pixels)
        if plan is None:
            return Outputs(self.network.forward_sizes([normalised(p, self.scale) for p in pixels], layers))
        found = plan(self.network, pixels, layers, self.scale, class_only)
        return found if isinstance(found, Outputs) else Outputs(found)

    def plan(self, pixels: Sequence[Tensor] = ()) -> Plan | None:
        """The plan for images of these sizes, [B, 3, H_px, W_px] each; None if the plain modules have to run."""
        return plan_of(self.network, self.mode, self._request(pixels))

    def why_not_plan(self) -> str | None:
        """The reason why the plain modules run instead of a plan, or None if there is a plan."""
        if self.network.device.type == "meta":
            return "the model is on the 'meta' device and has no values"
        with self._inference():
            return why_not_plan(self.network, self.mode, self._request())

    def _request(self, pixels: Sequence[Tensor] = ()) -> Request:
        weight = self.network.main_weight.dtype
        half = torch.bfloat16 if self._autocasts() else weight if weight.itemsize == 2 else None
        sizes, count = tuple((p.shape[2], p.shape[3]) for p in pixels), sum(p.numel() // 3 for p in pixels)
        return Request(self.samples, half, self.scale, sizes, count)

    def _grids(self, batch: PixelBatch, layers: Sequence[int]) -> list[tuple[int, int]]:
        """Grids (h, w) in patches: of the last layer, then of each layer asked for."""
        like = torch.empty(batch.pixels.shape, dtype=torch.float32, device="meta")
        return [self.network.grid_of(like, layer) for layer in (-1, *layers)]

    def attention_maps(
        self,
        batch: PixelBatch,
        block: int,  # from 0
        query: tuple[float, float] | None,  # (x, y) in pixels of the original image; None: the class token
    ) -> Tensor:
        """Maps [B, heads, h, w], see `Backbone.attention_maps`.

        Raises: UnsupportedError for a network without attention; InputError for a point outside the image or cropped
        away.
        """
        vit = self._transformer("an attention map")
        grid, prefix = self._grids(batch, ())[0], vit.num_prefix_tokens
        tokens = [0] * len(batch.placements)
        if query is not None:
            patches = (placement.to_patch(*query, grid) for placement in batch.placements)
            tokens = [prefix + row * grid[1] + column for row, column in patches]
        with self._inference():
            asked = torch.tensor(tokens, dtype=torch.int64, device="cpu")
            rows = attention_rows(vit, self._normalised(batch), block, asked)
        self.check_finite(rows.sum())
        return rows[:, :, 0, prefix:].unflatten(-1, grid)  # type: ignore[no-any-return]

    def precision(self, batch: PixelBatch) -> Precision:
        """Compares the tokens of a batch with those of the plain network in float32."""
        with self._inference():
            (found,) = self._outputs([batch.pixels.to(self.network.device)], [], "token")
        with torch.no_grad(), torch.autocast(self.network.device.type, enabled=False):
            return compare(found, self.network(self._normalised(batch), layers=[]))

    def _normalised(self, batch: PixelBatch) -> Tensor:
        return normalised(batch.pixels.to(self.network.device), self.scale)

    def warm(self, transform: Preprocess) -> None:
        """Compiles the kernels that images of this transform need on a GPU, so that a long run does not wait for it."""
        if self.on_gpu and isinstance(self.network, VisionTransformer):
            side = None if transform.fit == "native" else transform.size
            sizes = () if side is None else ((side, side),) if isinstance(side, int) else (side,)
            warm(self.network, self._request()._replace(sizes=sizes))

    def batcher(
        self,
        transform: Preprocess,
        launch: Launch[T],
        batch_size: int,
        *,
        num_workers: int | None = None,
        decode: Decode = "exact",
        max_tokens: int | None = None,
        shard_size: int | None = None,
        halves: bool = True,
    ) -> Batcher[T]:
        """A `Batcher` that runs `launch` over a stream of images, with settings that suit the device."""
        tokens, reading = max_tokens or self.max_tokens, self.reading(num_workers, decode)
        return Batcher(transform, launch, batch_size, tokens, reading, shard_size, halves, self.on_gpu)

    def reading(self, num_workers: int | None, decode: Decode = "exact") -> Reading:
        """How images are read for this device."""
        on_cpu = self.network.device.type == "cpu"
        if num_workers is None:
            threads = torch.get_num_threads() if on_cpu else min(8, os.cpu_count() or 1)
            num_workers = threads if threads > 1 else 0
        return Reading(num_workers, ahead=not on_cpu, decode=decode)

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens in one pass."""
        return MAX_TOKENS["cpu" if self.network.device.type == "cpu" else "cuda"]

    @property
    def arithmetic(self) -> str:
        """The dtype of the parameters, and the dtype of the matrix products where it differs."""
        dtype = str(self.network.main_weight.dtype).removeprefix("torch.")
        if not self.on_gpu and self.mode in ("exact", "plain"):
            return dtype
        with self._inference():  # only the plan knows whether another mode runs instead
            plan = self.plan()
        mode = "" if plan is None or plan.mode == "exact" else f", mode {plan.mode}"
        if not self.on_gpu:
            return f"{dtype}{mode}"
        products = ", products in bfloat16" if self._autocasts() else ""
        return f"{dtype}{products}{'' if plan is None else ', by a plan'}{mode}"

    def samples(self, size: tuple[int, int] | None = None) -> Tensor:
        """Pixels [3, 3, H_px, W_px] of the three images of the package, at `size` (height, width) or the default."""
        transform = self.preprocess if size is None else self.preprocess.with_options(size, "squash")
        images: list[ImageLike] = [_SAMPLES / f"{name}.png" for name in ("cat", "coffee", "rocket")]
        if transform.channels != 3:  # repeats the colours
            images = [load_image(image)[[c % 3 for c in range(transform.channels)]] for image in images]
        return self.batch(transform, images).pixels

    @property
    def scale(self) -> Scale:
        """Mean and standard deviation of each channel."""
        return self.preprocess.mean, self.preprocess.std

    @property
    def on_gpu(self) -> bool:
        """Whether the network runs on CUDA, beside the CPU."""
        return self.network.device.type == "cuda"

    def _transformer(self, what: str) -> VisionTransformer:
        if not isinstance(self.network, VisionTransformer):
            raise UnsupportedError(f"{what} needs attention, and this network has none; ask for layers= instead")
        return self.network

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.network.device.type, torch.bfloat16, enabled=self._autocasts()):
            yield

    def _autocasts(self) -> bool:
        weight = self.network.main_weight
        mixed = self.mixed_precision and weight.is_cuda and weight.dtype == torch.float32
        return mixed and not lacks_bfloat16(weight.device)

    def check_finite(self, total: Tensor) -> None:
        """Waits for `total`, a sum [] of all tokens.

        Raises: PrecisionError if the sum is not finite.
        """
        if math.isfinite(total.item()):
            return
        dtype = torch.bfloat16 if self._autocasts() else self.network.main_weight.dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise PrecisionError(
                f"the features are not finite in {dtype}: activations exceeded its range; load with dtype=torch.float32"
            )
        raise PrecisionError("the features are not finite: the weights hold NaN or infinity; load another checkpoint")
