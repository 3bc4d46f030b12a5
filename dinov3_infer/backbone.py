"""The public surface: load a backbone, give it images, save it.

This file is longer than 350 lines because the docstrings of `Backbone` are the reference for users.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, Self, TypeAlias, TypeVar, get_args, overload

import numpy as np
import torch
from torch import Tensor, nn

from . import web
from .checkpoints.describe import Description, describe, open_module
from .checkpoints.export_graph import Dynamic
from .checkpoints.fingerprint import fingerprint
from .checkpoints.identity import row_of_fingerprint
from .checkpoints.layouts import LayoutName
from .checkpoints.loading import Periods, load_model
from .checkpoints.reading import open_checkpoint
from .checkpoints.transforms import transform_of
from .devices import find_device, find_dtype
from .errors import Dinov3Error, InputError, InputTypeError, check_choice
from .features.extractor import Extractor
from .features.result import EmbedReport, Features, Kind, OutDtype, Pooling
from .features.stream import Decode, OnError, in_order, items_of
from .hub.locate import HubOptions, locate
from .images.decode import ImageLike
from .images.levels import Levels
from .images.opening import each_image
from .images.preprocess import Fit, PixelBatch
from .images.sources import Numbered, Source
from .model import dropin, dropin_convnext
from .model.attention import resolve_attention
from .model.convnext import ConvNeXt, ConvNeXtConfig
from .model.cpu.compiled import start_compiler
from .model.dispatch import Mode, Precision, drop_plan
from .model.introspection import Facet
from .model.network import BackboneOutput, Network, resolve_layers
from .model.vit import VisionTransformer, ViTConfig
from .system import survive_forks
from .zoo import Config, ModelInfo, Style, find

__all__ = ["Backbone", "ConvNeXtBackbone", "ViTBackbone"]

log = logging.getLogger("dinov3_infer")

Images: TypeAlias = ImageLike | Iterable[ImageLike]
Collection: TypeAlias = Images | Source | Numbered

P = ParamSpec("P")
R = TypeVar("R")


def _habits(function: Callable[P, R]) -> Callable[P, R]:
    """Accepts the keywords of transformers: `torch_dtype` means `dtype`, and `device_map` raises an error."""

    @wraps(function)
    def answered(*args: P.args, **options: P.kwargs) -> R:
        if "torch_dtype" in options and "dtype" not in options:
            options["dtype"] = options.pop("torch_dtype")
        if "device_map" in options:
            raise InputTypeError(
                "device_map is named device here: 'auto', 'cpu', 'cuda:1', 'mps'; a model has one device"
            )
        return function(*args, **options)

    return answered


class Backbone(Network):
    """A DINO-family network with its weights and the transform of its images.

    `Backbone` is an `nn.Module`: `.to`, `state_dict`, compile, export, DDP and adapters work.  `extract_features` takes
    images; calling the module takes normalised pixels.

    Each architecture has one class that combines this surface with a network, so that parameter names have no prefix.
    `Backbone(config)` makes an instance of the class for that config.

    Args:
        config: a `ViTConfig` or a `ConvNeXtConfig`.
        info: the row of the model table, which gives name, licence and transform; None for a model outside the table.

    Raises:
        InputTypeError: `config` is not a config, for example a name; `from_pretrained` and `from_config` take names.
    """

    networks: "ClassVar[dict[type, type[Backbone]]]" = {}  # type of a config -> the class for that network

    def __new__(cls, config: Any = None, *_: Any, **__: Any) -> Self:
        found = cls.networks.get(type(config), cls)
        return super().__new__(found if issubclass(found, cls) else cls)

    def __init__(self, config: Config, info: ModelInfo | None = None) -> None:
        if type(config) not in self.networks:
            name = config if isinstance(config, str) else "NAME"
            raise InputTypeError(
                f"{type(self).__name__}() takes a config, such as ViTConfig, got {type(config).__name__}; "
                f"Backbone.from_pretrained('{name}') loads a model"
            )
        super().__init__(config)
        survive_forks()
        self.info = info
        self.preprocess = transform_of(config, info)
        self.origin: dict[str, str] = {}  # for a loaded model: field -> its value and where it was found
        self._loaded: int | None = None  # for a loaded model: in-place writes to its parameters until then
        self.loaded_from: str | None = None  # the argument of `from_pretrained`
        self.mode: Mode = "exact"  # on a CPU, see `from_pretrained`
        self.mixed_precision = True  # on CUDA, matrix products with float32 weights run in bfloat16

    @classmethod
    @_habits
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attn_implementation: str = "auto",
        mode: Mode = "exact",
        preprocessing: Style | None = None,
        rope_periods: Periods | None = None,
        layout: LayoutName | None = None,
        num_heads: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads a model in eval mode.

        Files in the cache are used without asking the hub.  Loading is strict: a missing or an extra key is an error.

        Args:
            name: a model name ("vitb16"), a hub id, a timm id, a directory, a weights file, or a link to one.
            weights: a file, directory or link that holds the weights of `name` (default: those that `name` leads to).
            device: "auto" takes CUDA if available, then "mps" (an Apple GPU), then the CPU (default: "auto").  The
                first use of "mps" compares features with recorded ones; if they differ, the CPU is used and the log
                says so.
            dtype: "auto" keeps float32 parameters; on CUDA `extract_features` then multiplies matrices in bfloat16.  A
                torch dtype or its name casts the linear layers and the patch convolution; the residual stream, the
                norms and RoPE stay in float32 (default: "auto").
            attn_implementation: "auto", "triton", "sdpa" or "eager" (default: "auto").
            mode: arithmetic on a CPU with float32 parameters (default: "exact").  "exact" computes in float32.  "fast"
                multiplies in bfloat16; the cosine with float32 is at least 0.999 for 99 % of the patches.  "int8"
                multiplies in 8 bits; the cosine is 0.99 on average for class tokens and at least 0.98 for 99 % of the
                patches, at up to twice a default size of 320 pixels or less.  A model that does not reach this runs in
                another mode, and the log says which.  "plain" runs the modules of the network without a plan.  On CUDA
                "fast" and "int8" only change GELU to its tanh form.  `check_precision` measures the effect.
            preprocessing: None for the defaults of this package; "meta", "hf" or "timm" reproduces the image transform
                of that library (default: None).
            rope_periods: "exact", "bfloat16" (rounded, as in Meta's files), or None for those of the file (default:
                None).
            layout: "hf", "meta" or "timm", for a file whose key names do not decide it (default: detected).
            num_heads: number of attention heads, for a model whose files do not state it (default: detected).
            revision: branch, tag or commit of the hub repository (default: "main").
            token: hub token, or True for the stored one (default: the stored one, if any).
            cache_dir: folder for downloads (default: the hub's cache).
            local_files_only: use the cache only and never the network (default: False).

        Returns:
            The model, in eval mode, on `device`.

        Raises:
            ModelNotFoundError: no model, repository or file has this name.
            UnsupportedError: the checkpoint belongs to an architecture that this package does not have.
            MissingFileError: a path, or a file in a directory, does not exist.
            GatedModelError: the hub repository asks for a licence that this account has not accepted.
            OfflineError: the hub cannot be reached and the cache does not hold the model.
            CheckpointError: the file is damaged, or its keys or shapes do not fit the model.
            InputError: an option has a value that does not exist.

        Example:
            >>> bb = Backbone.from_pretrained("vitb16")
            >>> bb = Backbone.from_pretrained("vitl16", weights="model.safetensors", device="cpu")
        """
        target_device = _find_device(device)
        cast = find_dtype(dtype)
        check_choice("mode", mode, Mode)
        if target_device.type == "cpu" and cast in (None, torch.float32) and mode != "plain":
            start_compiler()  # compiles while the weights are read
        resolve_attention(attn_implementation)  # finds a typo before gigabytes are read
        if rope_periods not in (None, *get_args(Periods)):
            raise InputError(f"rope_periods is 'exact', 'bfloat16' (as in Meta's files) or None; got {rope_periods!r}")
        path, asked = locate(name, HubOptions(revision, token, cache_dir, local_files_only), weights)
        checkpoint = open_checkpoint(path)
        found = describe(checkpoint, layout=layout, expected=asked, preprocessing=preprocessing, num_heads=num_heads)
        model = load_model(cls, found, dtype=cast, device=target_device, periods=rope_periods)
        model._is(found)
        model.loaded_from = _origin(os.fspath(name if weights is None else weights))
        model.set_attention(attn_implementation)
        model.mode = mode
        model.mixed_precision = cast is None  # an explicit dtype is used for everything
        if cast == torch.float16:
            log.warning(
                "float16 can overflow, because DINO models are trained in bfloat16; results are checked for that, "
                "and dtype='bfloat16' is safer"
            )
        title = model.info.title if model.info else "model unknown"
        log.info("loaded '%s' on %s: %s, layout %s", path, model.device, title, found.stored.layout.label)
        return model

    @classmethod
    def from_config(cls, config: str | Config, *, seed: int | None = None) -> Self:
        """Makes a model with random weights, for tests and for training from scratch, in eval mode on the CPU.

        Args:
            config: a name of the model table, a `ViTConfig` or a `ConvNeXtConfig`.
            seed: seed of the weights; the global random state stays unchanged (default: the global state is used).

        Returns:
            The model.

        Raises:
            ModelNotFoundError: the table has no such name.
            InputTypeError: `config` is neither a name nor a config.

        Example:
            >>> bb = Backbone.from_config("vits16", seed=0)
        """
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return cls.from_config(config)
        if isinstance(config, Config):
            return cls(config).eval()
        if not isinstance(config, str):
            raise InputTypeError(
                f"from_config takes a name, a ViTConfig or a ConvNeXtConfig, got {type(config).__name__}; give 'vits16'"
            )
        info = find(config)
        return cls(info.config, info).eval()

    @classmethod
    def adopt(cls, model: nn.Module) -> Self:
        """Converts a live transformers, timm or Meta module, in eval mode, on its device and in its dtype.

        Tensors that both models store in the same form are shared: changing one changes the other.  Tensors that
        differ, such as the separate q, k and v of transformers, are copied.

        A supervised ViT of the same shape cannot be told from DINO v1, so it is accepted too.

        Args:
            model: the module.

        Returns:
            A Backbone.

        Raises:
            CheckpointError: the module holds no network of a known architecture.
            InputTypeError: `model` is not a module.
            InputError: `model` is already a Backbone.

        Example:
            >>> bb = Backbone.adopt(transformers.AutoModel.from_pretrained("facebook/dinov2-small"))
        """
        if not isinstance(model, nn.Module):
            raise InputTypeError(
                f"adopt takes a live module, got {type(model).__name__}; from_pretrained takes names and paths"
            )
        if isinstance(model, Backbone):
            raise InputError("this module is a Backbone already; use it directly, or copy it with copy.deepcopy")
        found = describe(open_module(model))
        adopted = load_model(cls, found, keep=True)
        adopted._is(found)
        adopted.mixed_precision = False
        return adopted

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, pixels: Tensor, layers: int | Sequence[int] | None = None, masks: Tensor | None = None
        ) -> BackboneOutput: ...
        @overload
        def __call__(self, *, pixel_values: Tensor, layers: int | Sequence[int] | None = None) -> BackboneOutput: ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Runs the network on normalised pixels; see `forward` of the network.

        Args:
            pixels: [B, 3, H_px, W_px], normalised with `preprocess.mean` and `preprocess.std`.  `pixel_values` is
                accepted as its name: `bb(**processor(images))`.
            layers: an int for the last n blocks, or a list of block numbers (default: no layers).
            masks: [B, P] bool, the patches to replace by the mask token (default: none).

        Returns:
            A `BackboneOutput`: `cls_token` [B, C], `register_tokens` [B, R, C], `patch_tokens` [B, P, C], and one such
            triple for each layer in `layers`, all after the final norm.

        Raises:
            InputError: the size in pixels is not a whole number of patches, or `masks` has another shape.
            LayerError: a block number does not exist.

        Example:
            >>> bb(bb.preprocess(["cat.jpg", "dog.jpg"])).patch_tokens  # [2, P, C]
            >>> bb(**processor(images, return_tensors="pt")).pooler_output  # [B, C], with a processor of transformers
        """
        if "pixel_values" in options:
            args = (options.pop("pixel_values"), *args)
        return super().__call__(*args, **options)

    def extract_features(
        self,
        images: Images,
        size: int | tuple[int, int] | None = None,
        fit: Fit | None = None,
        layers: int | Sequence[int] | None = None,
        pooling: Pooling = "cls",
        facet: Facet = "token",
        levels: Levels | None = None,
    ) -> Features:
        """Computes the features of one image or of a batch of images; one image gives a batch of 1.

        Args:
            images: a path, web address, bytes, PIL image, array [H_px, W_px, 3] or tensor [3, H_px, W_px] (RGB, uint8
                or float in 0..1), a list of these, or a 4-dimensional batch.
            size: pixels: the side for fit "squash", the short side for "crop", the long side for "pad" and "native"; or
                (height, width) (default: that of the model, for example 256).
            fit: "squash" resizes to a square, "crop" keeps the centre, "pad" fills up to a square (see `valid`),
                "native" keeps the aspect ratio (default: that of the model, "squash" for most).
            layers: an int for the last n blocks, or a list of block numbers; the results are in `.layers`, after the
                final norm (default: none).
            pooling: what `.embedding` holds: "cls" [B, C], "mean" of the patches [B, C], or "cls_mean", both
                concatenated [B, 2C] (default: "cls").
            facet: what `.layers` hold: "token", or "query", "key" or "value", the output of the block's qkv layer with
                its heads concatenated, before DINOv3's rotary position embedding (default: "token").
            levels: for images of more than 8 bits: (low, high) become black and white; "full" takes the range of the
                dtype, "percentile" the 0.5th and 99.5th percentile of each image (default: None, which raises an error
                where levels are needed).

        Returns:
            `Features` in float32 on the model's device.

        Raises:
            ImageError: an image cannot be decoded.
            MissingFileError: a path does not exist.
            InputError: an option has a value that does not exist, or the images of the batch differ in size after
                `fit`.
            LayerError: a block number does not exist.
            UnsupportedError: the network has no attention for `facet`, or cannot leave out the padding of fit "pad".
            PrecisionError: the features are not finite.

        Example:
            >>> f = bb.extract_features("photo.jpg", layers=[3, -1])
            >>> f.embedding.shape, f.feature_map.shape
            (torch.Size([1, 768]), torch.Size([1, 768, 16, 16]))
        """
        extractor = self.extractor
        blocks = extractor.layers(layers, pooling, facet)
        batch = extractor.batch(extractor.transform(size, fit, levels), each_image(images))
        return extractor.features([batch], blocks, pooling, facet)[0]

    @overload
    def iter_features(
        self, images: Images | Source, *, on_error: Literal["raise"] = ..., **options: Any
    ) -> Iterator[Features]: ...
    @overload
    def iter_features(
        self, images: Images | Source, *, on_error: Literal["return"], **options: Any
    ) -> Iterator[Features | Dinov3Error]: ...
    @overload
    def iter_features(
        self, images: Images | Source, *, on_error: OnError, **options: Any
    ) -> Iterator[Features | Dinov3Error | None]: ...
    def iter_features(  # type: ignore[misc]  # the overloads do not repeat the options
        self,
        images: Images | Source,
        *,
        size: int | tuple[int, int] | None = None,
        fit: Fit | None = None,
        layers: int | Sequence[int] | None = None,
        pooling: Pooling = "cls",
        facet: Facet = "token",
        levels: Levels | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[Features | Dinov3Error | None]:
        """Yields one `Features` per image, in input order, on the CPU; the images may differ in size.

        Args:
            images: as in `extract_features`, or any iterable of images, a folder or a pattern (see `list_images`).
            size: as in `extract_features`.
            fit: as in `extract_features`.
            layers: as in `extract_features`.
            pooling: as in `extract_features`.
            facet: as in `extract_features`.
            levels: as in `extract_features`.
            batch_size: largest number of images in a pass; large images run in smaller passes.  It does not change the
                features (default: 32).
            num_workers: threads that read images (default: as many as torch uses; up to 8 beside a GPU).
            on_error: for an image that cannot be read: "raise" raises its error, "return" yields the error in its
                place, "skip" logs it and yields None (default: "raise").

        Yields:
            `Features` of one image: `embedding` [1, C], `patch_tokens` [1, P, C].

        Raises:
            InputError: an option has a value that does not exist.  Other errors are those of `extract_features`.

        Example:
            >>> for f in bb.iter_features("photos/"):
            ...     print(f.embedding.shape)
        """
        check_choice("on_error", on_error, OnError)
        extractor = self.extractor
        blocks = extractor.layers(layers, pooling, facet)

        def features(batches: list[PixelBatch]) -> Callable[[], list[Sequence[Features]]]:
            found, total = extractor.launched(batches, blocks, pooling, facet)
            there, total = [each.to("cpu", non_blocking=True) for each in found], total.to("cpu", non_blocking=True)
            landed = extractor.landing()

            def wait() -> list[Sequence[Features]]:
                landed()
                extractor.check_finite(total)
                return [list(each) for each in there]

            return wait

        transform = extractor.transform(size, fit, levels)
        batcher = extractor.batcher(transform, features, batch_size, num_workers=num_workers)
        return in_order(batcher(items_of(images if isinstance(images, Source) else each_image(images))), on_error)

    @overload
    def embed(self, images: Collection, out: None = None, **options: Any) -> np.ndarray[Any, Any]: ...
    @overload
    def embed(self, images: Collection, out: str | os.PathLike[str], **options: Any) -> EmbedReport: ...
    def embed(  # type: ignore[misc]
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
        levels: Levels | None = None,
        decode: Decode = "exact",
        batch_size: int | None = None,
        shard_size: int | None = None,
        num_workers: int | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        overwrite: bool = False,
        trust_names: bool = False,
        progress: bool | None = None,
    ) -> np.ndarray[Any, Any] | EmbedReport:
        """Computes one row per image, in input order, and returns an array or writes files.

        A call with `out` that was interrupted continues where it stopped, and a rerun adds what is missing.  Under
        torchrun each process writes a part of a folder.

        Args:
            images: as in `iter_features`; also a list file, a tar archive, a Parquet table or a Hugging Face Dataset.
            out: a name that ends in .npy or .safetensors (a .jsonl beside it holds row, path, grid and error of each
                image), or in .parquet (one file with all of these); a name without suffix, or with a slash at its end,
                is a folder of such files (default: None, return an array).
            kind: "embedding" [N, C] ([N, 2C] with pooling "cls_mean"), "patches" [N, P, C], or "map" [N, C, h, w]
                (default: "embedding").
            pooling: as in `extract_features`.
            normalize: scale each vector to length 1, for cosine similarity by dot product (default: False).
            out_dtype: "float32" or "float16", of the array or file (default: "float32").
            size: as in `extract_features`.
            fit: as in `extract_features`.
            levels: as in `extract_features`.
            decode: "fast" lets the JPEG decoder shrink large photographs, which changes vectors a little (default:
                "exact").
            batch_size: images per pass; it does not change the vectors (default: 32 for an array, measured for files).
            shard_size: images per shard (default: 10,000, or as many as have 256 MiB of rows).
            num_workers: as in `iter_features`.
            on_error: "raise", or "skip", which leaves a row of NaN for an image that cannot be read (default: "raise").
            overwrite: write everything again, whatever is at `out`; an interrupted call of this kind continues when it
                is repeated (default: False).
            trust_names: take a file of the same name for the same image.  Otherwise a rerun compares size and time of
                each file, and a hash of each web address with its query; images that changed, and those that failed,
                are computed again (default: False).
            progress: show a progress bar on stderr (default: if stderr is a terminal).

        Returns:
            The array, or with `out` an `EmbedReport` with the path, the shape, and the images that failed.

        Raises:
            InputError: patches or maps differ in shape, or `out` holds vectors of other images or settings.
            Dinov3Error: with on_error="raise", the error of the first image that cannot be read.

        Example:
            >>> vectors = bb.embed("photos/", normalize=True)
            >>> report = bb.embed(["a.jpg", "b.jpg"], out="vectors.npy", on_error="skip")
        """
        options: dict[str, Any] = dict(locals())  # the keyword arguments are the fields of EmbedOptions
        del options["self"], options["images"], options["out"]
        from .features.embed import embed  # few processes need these
        from .features.vectors import EmbedOptions

        return embed(self.extractor, images, out, EmbedOptions(**options))

    def attention_maps(
        self,
        images: Images,
        layer: int = -1,
        query: Literal["cls"] | tuple[float, float] = "cls",
        size: int | tuple[int, int] | None = 768,
        fit: Fit | None = "native",
        levels: Levels | None = None,
    ) -> Tensor:
        """Computes how much a token attends to each patch.

        The softmax runs over all tokens, so a map and the attention to class token and registers sum to 1.  Only the
        rows of the attention matrix that are asked for are computed.

        Args:
            images: as in `extract_features`.
            layer: number of the block, from 0, or negative from the end (default: -1).
            query: "cls", or a point (x, y) in pixels of the original image, for the patch that covers it (default:
                "cls").
            size: as in `extract_features` (default: 768).
            fit: as in `extract_features` (default: "native").
            levels: as in `extract_features`.

        Returns:
            [B, heads, h, w] float32, one map per head.

        Raises:
            InputError: the point is outside the image or was cropped away, or `query` is not a point.
            InputTypeError: `layer` is not a whole number.
            LayerError: the block does not exist.
            UnsupportedError: the network is a ConvNeXt, which has no attention.
            PrecisionError: the attention is not finite.

        Example:
            >>> bb.attention_maps("photo.jpg", query=(120, 80)).shape
            torch.Size([1, 12, 32, 48])
        """
        if not hasattr(layer, "__index__"):
            raise InputTypeError(f"layer is the number of one block, got {layer!r}; call attention_maps once per block")
        (block,) = resolve_layers([layer], self.n_blocks)
        batch = self.extractor.transform(size, fit, levels).batch(each_image(images))
        return self.extractor.attention_maps(batch, block, None if query == "cls" else _point(query))

    def check_precision(
        self, images: Images, size: int | tuple[int, int] | None = None, fit: Fit | None = None
    ) -> Precision:
        """Compares the features of these images with those of the plain network in float32.

        Use it for models that trade accuracy for speed: `mode="fast"` or "int8" on a CPU, or bfloat16 on CUDA.

        Args:
            images: as in `extract_features`.
            size: as in `extract_features`.
            fit: as in `extract_features`.

        Returns:
            `Precision`: cosines of the class tokens and of the patches.

        Raises:
            Dinov3Error: as in `extract_features`.
        """
        batch = self.extractor.transform(size, fit).batch(each_image(images))
        return self.extractor.precision(batch)

    @property
    def extractor(self) -> Extractor:
        """The network with its transform and the settings of its arithmetic."""
        return Extractor(self, self.preprocess, self.mode, self.mixed_precision)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the same for each layout that they are stored in; see `checkpoints.fingerprint`."""
        return fingerprint(self.state_dict(), self.config)

    def save_pretrained(self, directory: str | os.PathLike[str], layout: LayoutName = "hf") -> Path:
        """Writes the weights and their config.

        Args:
            directory: the target: a directory for "hf" and "timm", a file for "meta".
            layout: "hf" for transformers, "timm", or "meta" for one file under Meta's names (default: "hf").

        Returns:
            The path that was written.  sentence-transformers loads the "hf" layout too, and encodes an image to its
            class token.

        Raises:
            UnsupportedError: the layout cannot hold this model.
            InputError: the target is a file where a directory is needed, or a directory where a file is needed.

        Example:
            >>> bb.save_pretrained("my-dinov3")
            >>> bb.save_pretrained("my-dinov3.pth", layout="meta")
        """
        from .checkpoints.saving import save_checkpoint  # few processes need this

        return save_checkpoint(self, directory, layout, self._named(), self.preprocess)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | tuple[int, int] | None = None,
        dynamic: Dynamic = "batch",
        opset: int = 18,
    ) -> Path:
        """Writes a file for other engines: .onnx, or .pt2, which torch runs without this package.

        The input is `pixel_values` [B, 3, H_px, W_px] float32, normalised with `preprocess.mean` and `preprocess.std`.
        The outputs are `cls_token` [B, C], `register_tokens` [B, R, C] (if the model has any) and `patch_tokens` [B, P,
        C].

        The file is run in ONNX Runtime, or in torch, on noise of several sizes.  It gets its name if it reproduces the
        tokens of this model; otherwise the name ends in .failed.  Weights above 1 GiB go to a .data file beside it.

        Args:
            path: the file; its suffix is .onnx or .pt2.
            size: pixels, the side of a square or (height, width) (default: that of the model).  With `dynamic=True` it
                is the first size that is checked.
            dynamic: what may change from call to call: "batch" the number of images, True also height and width (two
                patches a side at least), False nothing, with B = 1 (default: "batch").  With a fixed size the position
                tables are constants.
            opset: the ONNX opset, 18 to 23 (default: 18).

        Returns:
            The path of the file.

        Raises:
            InputError: the size or the suffix is wrong.
            UnsupportedError: the opset or the dtype cannot be exported, or a package is missing.
            PrecisionError: the file gives other tokens than the model.

        Example:
            >>> bb.export("vitb16.onnx", size=224)
        """
        from .checkpoints.export import export_model  # imported here, because few processes export or publish

        return export_model(self, path, self.preprocess, self._named(), size=size, dynamic=dynamic, opset=opset)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Weights, written by dinov3_infer",
        card: str | None = None,
    ) -> str:
        """Uploads the model in the layout that transformers loads.

        Args:
            repo_id: "name" or "owner/name".
            private: whether a new repository is private (default: the account's setting).
            revision: a branch, which is made if it does not exist (default: "main").
            token: hub token, or True for the stored one (default: the stored one).
            commit_message: title of the commit.
            card: text of the README.md.  None writes a card if the repository has none; it states the licence of the
                model that these weights are, or were trained from, if it is known (see `origin`), and no licence
                otherwise (default: None).

        Returns:
            The link of the commit.

        Raises:
            InputError: the id is wrong, or there is no token.
            GatedModelError: the token has no write access.
            OfflineError: the hub cannot be reached.

        Example:
            >>> bb.push_to_hub("me/my-dinov3", private=True)
        """
        from .hub.publish import push

        return push(
            self, repo_id, self._named(), self.preprocess, self.origin,
            private=private, revision=revision, token=token, commit_message=commit_message, card=card,
        )  # fmt: skip

    def why_not_plan(self) -> str | None:
        """Says why `extract_features` and `embed` run plain modules, or returns None if they run by a plan.

        A plan computes the same features in fewer steps from repacked weights.  If there is none yet, this call makes
        one.  On CUDA the first plan of each kind is compared with the plain network on images of the package; if it
        fails or differs it is not used, and this method returns the reason.
        """
        return self.extractor.why_not_plan()

    def refresh(self) -> None:
        """Drops the plan, so that the next call uses the present weights.

        Call it after writing to weights in a way that torch does not notice, such as through `.data` or a pointer.  On
        a CPU, long calls notice such a change themselves, by a checksum of all weights.  Shorter calls, for which the
        checksum would take more than 2 % of the time, compare only tensor versions and four values of each tensor.  The
        limit is about 1,000 tokens per thread, or 250 for weights up to 16 MiB.
        """
        drop_plan(self)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; training mode also frees the memory of the plan."""
        if mode:
            drop_plan(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        drop_plan(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The name of the model and its dimensions, for `repr`."""
        info = self._named()
        return f"{info.title if info else 'unknown model'}: {self.summary()}"

    def _is(self, found: Description) -> None:
        """Takes over the description of the weights that were just loaded."""
        self.info, self.preprocess, self.origin = found.info, found.preprocess, found.origin
        whole = not self.main_weight.is_meta
        if self.info is None and whole and (proven := row_of_fingerprint(self.config, self.fingerprint)) is not None:
            self.info = proven
            self.origin |= {
                "name": f"{proven.name}, from the fingerprint",
                "licence": f"{proven.licence}, from the name",
            }
        self._loaded = _writes(self)

    def _named(self) -> ModelInfo | None:
        """`info`; marked as derived if a parameter was written to after loading."""
        if self.info is None or self._loaded is None or _writes(self) <= self._loaded:
            return self.info
        return replace(self.info, derived=True)


class ViTBackbone(Backbone, VisionTransformer):
    """A Backbone whose network is a vision transformer, with the methods of Meta, timm and transformers."""

    forward_features = dropin.forward_features
    get_intermediate_layers = dropin.get_intermediate_layers
    get_last_selfattention = dropin.get_last_selfattention
    forward_intermediates = dropin.forward_intermediates
    feature_info = property(dropin.feature_info)
    set_grad_checkpointing = dropin.set_grad_checkpointing
    gradient_checkpointing_enable = dropin.gradient_checkpointing_enable
    gradient_checkpointing_disable = dropin.gradient_checkpointing_disable
    is_gradient_checkpointing = property(lambda self: self.grad_checkpointing)


class ConvNeXtBackbone(Backbone, ConvNeXt):
    """A Backbone whose network is a ConvNeXt, with the methods of Meta and timm."""

    forward_features = dropin_convnext.forward_features
    get_intermediate_layers = dropin_convnext.get_intermediate_layers
    forward_intermediates = dropin_convnext.forward_intermediates


Backbone.networks |= {ViTConfig: ViTBackbone, ConvNeXtConfig: ConvNeXtBackbone}


def _writes(model: nn.Module) -> int:
    return sum(0 if p.is_inference() else p._version for p in model.parameters())


def _origin(name: str) -> str:
    """The name or absolute path that loads the same weights again; without a query, which may sign a link."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else web.without_query(name) if "://" in name else name


def _point(query: Any) -> tuple[float, float]:
    try:
        x, y = query
        return float(x), float(y)
    except (TypeError, ValueError):
        raise InputError(f"query is 'cls' or a point (x, y) in pixels, got {query!r}") from None


@cache
def why_not_mps() -> str | None:
    """Why the Apple GPU is not used, or None.  The first call compares features of nano with recorded ones."""
    from .recorded import why_not  # few processes need this

    return why_not(Backbone.from_pretrained("nano", device="cpu"), torch.device("mps"))


def _find_device(device: str | torch.device) -> torch.device:
    found, reason = find_device(device, why_not_mps)
    if reason is not None:
        log.warning("using the CPU in place of the Apple GPU: %s", reason)
    return found
