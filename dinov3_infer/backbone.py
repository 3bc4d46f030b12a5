"""The surface: load a backbone, give it images, save it.

This file has more than 350 lines because the class is the documentation of all that users call.
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
from .checkpoints.fingerprint import fingerprint
from .checkpoints.identity import row_of_fingerprint
from .checkpoints.layouts import LayoutName
from .checkpoints.loading import Periods, load_model
from .checkpoints.reading import open_checkpoint
from .checkpoints.saving import save_checkpoint
from .checkpoints.transforms import transform_of
from .devices import find_device, find_dtype
from .errors import Dinov3Error, InputError, InputTypeError, check_choice
from .features.embed import embed
from .features.extractor import Extractor
from .features.result import Features, Pooling
from .features.stream import Decode, OnError, in_order, items_of
from .features.vectors import EmbedOptions, EmbedReport, Kind, OutDtype
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
from .recorded import why_not
from .system import survive_forks
from .zoo import Config, ModelInfo, Style, find

__all__ = ["Backbone", "ConvNeXtBackbone", "ViTBackbone"]

if TYPE_CHECKING:
    from .checkpoints.export_graph import Dynamic

log = logging.getLogger("dinov3_infer")

Images: TypeAlias = ImageLike | Iterable[ImageLike]
Collection: TypeAlias = Images | Source | Numbered

P = ParamSpec("P")
R = TypeVar("R")


def _habits(function: Callable[P, R]) -> Callable[P, R]:
    """Answers the keywords of transformers: `torch_dtype` is taken as `dtype`, others get the name to use here."""

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

    An ordinary module: `.to`, `state_dict`, compile, export, DDP and adapters work.  `extract_features` takes images,
    calling it takes normalised pixels.

    This class is the surface.  It is combined with a network in one class for each architecture, so that parameters
    keep their names; `Backbone(config)` makes the one of the config.
    """

    networks: "ClassVar[dict[type, type[Backbone]]]" = {}  # type of a config -> this surface with its network

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
        self.origin: dict[str, str] = {}  # of a loaded model: field -> what was taken, and from where
        self._loaded: int | None = None  # of a loaded model: how often its parameters had been written to
        self.loaded_from: str | None = None  # what `from_pretrained` was given
        self.mode: Mode = "exact"  # on a CPU, see `from_pretrained`
        self.mixed_precision = True  # on CUDA the matrix work of float32 weights is done in bfloat16

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
        """Loads a model by name ("vitb16"), hub id, timm id, directory, weights file or link to one, in eval mode.

        What is in the cache is used without asking the hub; see `hub`.

        `weights`: a file, directory or link that holds the weights of `name`.
        `device`: "auto" is "cuda" where there is one, then "mps" (an Apple GPU), else "cpu".  The first use of "mps" is
        checked against recorded features; where they differ, the CPU is used and the log says so.
        `dtype`: "auto" keeps float32 parameters, and on CUDA `extract_features` does the matrix work in bfloat16.  A
        torch dtype or its name casts the linears and the patch convolution; the stream, norms and RoPE stay float32.
        `mode`: on a CPU, for float32 parameters.  "exact" computes in float32, "fast" multiplies in bfloat16 (cosine
        with float32: 0.999 in all but 1 % of the patches), "int8" in 8 bits (class tokens 0.99 on average, patches 0.98
        in all but 1 %, up to twice a default size of 320 pixels or less; a model that is further off does without).
        See `check_precision`; where something else has to run, the log says so.  On CUDA "fast" and "int8" take the
        tanh form of GELU, and nothing else is different.
        `preprocessing`: None for our defaults, "meta", "hf" or "timm" for exactly what those do with a picture.
        `rope_periods`: None for those of the file, "exact", or "bfloat16" for those that Meta's files hold.
        `layout`: "hf", "meta" or "timm" where the names in a file do not tell.
        `num_heads`: of a model of one's own whose files do not state it.

        Raises: ModelNotFoundError, UnsupportedError, MissingFileError, GatedModelError, OfflineError, CheckpointError.
        """
        target_device = _find_device(device)
        cast = find_dtype(dtype)
        check_choice("mode", mode, Mode)
        if target_device.type == "cpu" and cast in (None, torch.float32) and mode != "plain":
            start_compiler()  # it is done when the weights are read
        resolve_attention(attn_implementation)  # typos are found before gigabytes are read
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
        model.mixed_precision = cast is None  # an explicit dtype is meant
        if cast == torch.float16:
            log.warning(
                "DINO models are trained in bfloat16 and float16 can overflow; results are checked, "
                "and bfloat16 is the safer choice"
            )
        title = model.info.title if model.info else "nothing names these weights"
        log.info("loaded '%s' on %s: %s, layout %s", path, model.device, title, found.stored.layout.label)
        return model

    @classmethod
    def from_config(cls, config: str | Config, *, seed: int | None = None) -> Self:
        """Random weights, for tests and for training from scratch: a name of the zoo or a config of one's own."""
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return cls.from_config(config)
        if isinstance(config, Config):
            return cls(config).eval()
        if not isinstance(config, str):
            raise InputTypeError(
                f"from_config takes a name, a ViTConfig or a ConvNeXtConfig, got {type(config).__name__}"
            )
        info = find(config)
        return cls(info.config, info).eval()

    @classmethod
    def adopt(cls, model: nn.Module) -> Self:
        """A live transformers, timm or Meta module as a Backbone, in eval mode, on its device and in its dtype.

        Tensors that both keep in the same form are shared: changing one changes the other.  Those that differ, such as
        transformers' separate q, k and v, are copied.

        A supervised ViT of the same shape cannot be told from DINO v1 and is taken too.

        Raises: CheckpointError for a module that holds no ViT of this architecture.
        """
        if not isinstance(model, nn.Module):
            raise InputTypeError(
                f"adopt takes a live module, got {type(model).__name__}; from_pretrained takes names and paths"
            )
        if isinstance(model, Backbone):
            raise InputError("this module is a Backbone already; use it as it is, or copy.deepcopy it")
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
        """As `forward`.  `pixel_values` is transformers' name for the pixels.

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
        """Features of one picture or a batch of pictures; a single one gives a batch of 1.

        `images`: path, address, bytes, PIL image, array [H_px, W_px, 3], tensor [3, H_px, W_px] (RGB, uint8 or float in
        0..1), a list of these, or a 4-dimensional batch.
        `size`: pixels.  The side for fit "squash", the short side for "crop", the long side for "pad" and "native".
        `fit`: "squash" to a square, "crop" the centre, "pad" to a square (see `valid`), "native" keeps the aspect.
        `layers`: an int for the last n blocks, a list for these; results are in `.layers`, after the final norm.
        `pooling`: what `.embedding` is: "cls", "mean" of the patches, or "cls_mean", both in a row.
        `facet`: what `.layers` are: the tokens, or the "query", "key" or "value" of each block: the output of its qkv
        layer, heads side by side, without the rotation that DINOv3 applies after it, which depends on the position.
        `levels`: of images of more than 8 bits what is black and white: (low, high), "full" for the range of their
        type, or "percentile" for the 0.5th and 99.5th of each image.

        Raises: ImageError, MissingFileError, InputError, LayerError; PrecisionError where the features are not finite.
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
    def iter_features(  # type: ignore[misc]  # which options there are is known by this signature alone
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
        """One `Features` per picture, of any sizes, in the order of the input, on the CPU.

        `images`: as in `extract_features`, or any iterable of pictures, a folder or a pattern (see `list_images`).
        `batch_size`: pictures of one pass at most; large ones go in smaller passes.  It does not change the features.
        `levels`: as in `extract_features`.
        `num_workers`: threads that read pictures; None for as many as torch has on a CPU, and up to 8 beside a GPU.
        `on_error`: for a picture that cannot be read "raise" its error, "return" it in its place, or "skip", which
        gives None and logs why.

        Raises: as `extract_features`.
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
        """One row per picture in the order of the input: an array, or the file or folder `out` and a report.

        `images`: as in `iter_features`; also a list file, tar archive, Parquet table or Dataset.
        `out`: .npy or .safetensors, beside which goes a .jsonl with row, path, grid and error of every picture, or
        .parquet with all in one; a name without suffix, or with a slash behind it, is a folder of such files.  What is
        there of the same call is kept, what is missing is added; under torchrun each process writes a part of a folder.
        `kind`: "embedding" [N, C] ([N, 2C] with pooling "cls_mean"), "patches" [N, P, C], or "map" [N, C, h, w].
        `normalize`: every vector to length 1, for cosine similarity by dot product.
        `decode`: "fast" lets a JPEG's decoder make large photographs smaller, which changes vectors a little.
        `batch_size`: pictures of one pass; None for what is found to be fastest.  It does not change vectors.
        `shard_size`: pictures that are written at a time; None for 10,000, or as many as have 256 MiB.
        `num_workers`, `size`, `fit`, `levels`: as in `iter_features`.
        `on_error`: "raise", or "skip", which leaves a row of NaN for a picture that cannot be read.
        `overwrite`: begin anew, whatever is there; a call that was killed goes on with what it has written since.
        `trust_names`: an image is what had its name before.  Otherwise a rerun looks at the size and time of each file,
        and at a hash of each address with its query; what differs, and what had failed, is computed again.
        `progress`: a bar on stderr; None shows it where that is a terminal.

        Raises: as `iter_features`; InputError where patches or maps differ in shape, or where what is at `out` was made
        in another way or from other pictures.
        """
        options: dict[str, Any] = dict(locals())  # the signature lists what EmbedOptions holds
        del options["self"], options["images"], options["out"]
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
        """How much a token attends to each patch, [B, H, h, w], one map per head.

        The softmax runs over all tokens, so a map sums to what class token and registers leave of 1.
        `layer`: a block from 0, or from the end.
        `query`: "cls", or a point (x, y) in pixels of the original picture for the patch that covers it.

        Raises: as `extract_features`; InputError for a point that is outside the picture or cropped away.
        """
        if not hasattr(layer, "__index__"):
            raise InputTypeError(f"layer is the number of one block, got {layer!r}; call it once for each")
        (block,) = resolve_layers([layer], self.n_blocks)
        batch = self.extractor.transform(size, fit, levels).batch(each_image(images))
        return self.extractor.attention_maps(batch, block, None if query == "cls" else _point(query))

    def check_precision(
        self, images: Images, size: int | tuple[int, int] | None = None, fit: Fit | None = None
    ) -> Precision:
        """How near the features of these pictures are to those of the model as it is written, in plain float32.

        This is for models that run faster at some cost: with `mode="fast"` or "int8" on a CPU, or in bfloat16 on CUDA.

        Raises: as `extract_features`.
        """
        batch = self.extractor.transform(size, fit).batch(each_image(images))
        return self.extractor.precision(batch)

    @property
    def extractor(self) -> Extractor:
        """The network with what features are computed with."""
        return Extractor(self, self.preprocess, self.mode, self.mixed_precision)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the same whichever layout they came from; see `checkpoints.fingerprint`."""
        return fingerprint(self.state_dict(), self.config)

    def save_pretrained(self, directory: str | os.PathLike[str], layout: LayoutName = "hf") -> Path:
        """Writes a directory that transformers loads ("hf") or timm ("timm"), or one file under Meta's names ("meta").

        sentence-transformers loads the first of them too, and encodes images to our class token; see the guide
        "Notebooks and probes".

        Raises: UnsupportedError for a model that the layout cannot hold, InputError for a target of the wrong kind.
        """
        return save_checkpoint(self, directory, layout, self._named(), self.preprocess)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | tuple[int, int] | None = None,
        dynamic: "Dynamic" = "batch",
        opset: int = 18,
    ) -> Path:
        """Writes a file for other engines: .onnx, or .pt2, which torch runs without this package.

        Its input is `pixel_values` [B, 3, H_px, W_px] float32, normalised with `preprocess.mean` and `.std`; its
        outputs are `cls_token`, `register_tokens` (if the model has any) and `patch_tokens`, as in `BackboneOutput`.

        `size`: pixels, the side of a square or (height, width); None for that of the model.  Where all sizes are taken
        the check begins with it.
        `dynamic`: what may differ from call to call: "batch", the number of pictures; True, height and width too, two
        patches a side at least; False, nothing, and B is 1.  With one size the tables of positions are constants.
        `opset`: of ONNX, 18 to 23.

        The file is run in ONNX Runtime, or torch, on noise of several sizes, and gets its name when it gives the tokens
        of this model; otherwise it is called .failed.  More than 1 GiB of weights lie beside it, in a .data file.

        Raises: InputError for a wrong size or suffix, UnsupportedError for an opset, a dtype or a package that is not
        there, PrecisionError for a file that gives other tokens.
        """
        from .checkpoints.export import export_model  # not above: few processes export or publish

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
        """Uploads the model in the layout that transformers loads, and returns the link of the commit.

        `revision`: a branch, made if there is none.
        `card`: the README.md to write; None writes one where there is none yet.  It gives the licence of the model that
        these weights are or were trained on from, where something names it (see `origin`); for others it gives none.

        Raises: InputError for a wrong id or no token, GatedModelError without the right to write, OfflineError.
        """
        from .hub.publish import push

        return push(
            self, repo_id, self._named(), self.preprocess, self.origin,
            private=private, revision=revision, token=token, commit_message=commit_message, card=card,
        )  # fmt: skip

    def why_not_plan(self) -> str | None:
        """Why `extract_features` and `embed` run the model as it is written, or None if they run it by a plan.

        A plan computes the same from weights of its own in fewer steps; one is made for the answer if there is none.
        On CUDA the first plan of each kind is compared with the model as it is written, by images of the package, and
        is not used where it differs or fails: this is where the reason is kept.
        """
        return self.extractor.why_not_plan()

    def refresh(self) -> None:
        """Frees the plan, so that the next features come from the weights as they are then.

        To be called after writing to weights in a way that torch does not see, such as through `.data` or a pointer.
        On a CPU a call of many images sees that by itself: where it takes less than 2 % of the call, a checksum of all
        values is compared (about 1,000 tokens for each thread, 250 for weights up to 16 MiB); shorter calls look at
        versions and at four values of each tensor.
        """
        drop_plan(self)

    def train(self, mode: bool = True) -> Self:
        """As torch's; a model in training frees the memory of its fast path."""
        if mode:
            drop_plan(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        drop_plan(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        info = self._named()
        return f"{info.title if info else 'weights that nothing names'}: {self.summary()}"

    def _is(self, found: Description) -> None:
        """Takes over what was found out about the weights that were just loaded."""
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
        """`info`, as derived where a parameter was written to since it was loaded."""
        if self.info is None or self._loaded is None or _writes(self) <= self._loaded:
            return self.info
        return replace(self.info, derived=True)


class ViTBackbone(Backbone, VisionTransformer):
    """A Backbone whose network is a vision transformer, with methods under Meta's, timm's and transformers' names."""

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
    """A Backbone whose network is a ConvNeXt, with the methods that Meta's and timm's users call."""

    forward_features = dropin_convnext.forward_features
    get_intermediate_layers = dropin_convnext.get_intermediate_layers
    forward_intermediates = dropin_convnext.forward_intermediates


Backbone.networks |= {ViTConfig: ViTBackbone, ConvNeXtConfig: ConvNeXtBackbone}


def _writes(model: nn.Module) -> int:
    return sum(0 if p.is_inference() else p._version for p in model.parameters())


def _origin(name: str) -> str:
    """What leads to the same weights again, from any folder; no query, which may sign a link."""
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
    """Why the Apple GPU is not used, or None: the first use compares features of nano with the recorded ones."""
    return why_not(Backbone.from_pretrained("nano", device="cpu"), torch.device("mps"))


def _find_device(device: str | torch.device) -> torch.device:
    found, reason = find_device(device, why_not_mps)
    if reason is not None:
        log.warning("the Apple GPU is not used and the CPU is: %s", reason)
    return found
