"""The surface: load a backbone, give it pictures, save it."""

import logging
import os
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import nn

from .checkpoints.architecture import rows_like
from .checkpoints.describe import describe, open_module, transform_of
from .checkpoints.export import Dynamic, export_model
from .checkpoints.fingerprint import fingerprint
from .checkpoints.layouts import LayoutName
from .checkpoints.loading import Periods, load_model
from .checkpoints.reading import open_checkpoint
from .checkpoints.saving import save_checkpoint
from .errors import InputError, InputTypeError, check_choice
from .features.extractor import FeatureExtractor
from .hub.locate import HubOptions, locate
from .hub.publish import push
from .model.attention import resolve_attention
from .model.cpu.compiled import start_compiler
from .model.dispatch import Mode, drop_plan
from .model.vit import ViTConfig
from .zoo import ModelInfo, Style, find

__all__ = ["Backbone"]

log = logging.getLogger("dinov3_infer")


class Backbone(FeatureExtractor):
    """A DINO-family vision transformer with its weights and the transform of its pictures.

    An ordinary module: `.to`, `state_dict`, compile, export, DDP and adapters work.  `extract_features` takes pictures,
    calling it takes normalised pixels.
    """

    def __init__(self, config: ViTConfig, info: ModelInfo | None = None) -> None:
        super().__init__(config, transform_of(config, info))
        self.info = info

    @classmethod
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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads a model by name ("vitb16"), hub id, timm id, directory, weights file or link to one, in eval mode.

        What is in the cache is used without asking the hub; see `hub`.

        `weights`: a file, directory or link that holds the weights of `name`.
        `device`: "auto" is CUDA where there is one, else the CPU.
        `dtype`: "auto" keeps float32 parameters, and on CUDA `extract_features` does the matrix work in bfloat16.  A
        torch dtype or its name casts the linears and the patch convolution; the stream, norms and RoPE stay float32.
        `mode`: on a CPU, for float32 parameters.  "exact" computes in float32, "fast" multiplies in bfloat16 (cosine
        with float32: 0.999), "int8" in 8 bits (class tokens 0.99 on average, patches 0.98 in all but 1 %; a model that
        is further off does without).  See `check_precision`; where something else has to run, the log says so.
        `preprocessing`: None for our defaults, "meta", "hf" or "timm" for exactly what those do with a picture.
        `rope_periods`: None for those of the file, "exact", or "bfloat16" for those that Meta's files hold.
        `layout`: "hf", "meta" or "timm" where the names in a file do not tell.

        Raises: ModelNotFoundError, UnsupportedError, MissingFileError, GatedModelError, OfflineError, CheckpointError.
        """
        target_device = _device(device)
        cast = _dtype(dtype)
        check_choice("mode", mode, Mode)
        if target_device.type == "cpu" and cast in (None, torch.float32) and mode != "plain":
            start_compiler()  # it is done when the weights are read
        resolve_attention(attn_implementation)  # typos are found before gigabytes are read
        if rope_periods not in (None, *get_args(Periods)):
            raise InputError(f"rope_periods is 'exact', 'bfloat16' (as in Meta's files) or None; got {rope_periods!r}")
        path, asked = locate(name, HubOptions(revision, token, cache_dir, local_files_only), weights)
        checkpoint = open_checkpoint(path)
        found = describe(checkpoint, layout=layout, expected=asked, preprocessing=preprocessing)
        model = load_model(cls, found, dtype=cast, device=target_device, periods=rope_periods)
        model.info, model.preprocess = found.info, found.preprocess
        model.set_attention(attn_implementation)
        model.mode = mode
        model.mixed_precision = cast is None  # an explicit dtype is meant
        if cast == torch.float16:
            log.warning(
                "DINO models are trained in bfloat16 and float16 can overflow; results are checked, "
                "and bfloat16 is the safer choice"
            )
        log.debug(
            "%s: layout %s, %s",
            path, found.stored.layout.label, found.info.name if found.info else "an architecture of its own",
        )  # fmt: skip
        return model

    @classmethod
    def from_config(cls, config: str | ViTConfig, *, seed: int | None = None) -> Self:
        """Random weights, for tests and for training from scratch: a name of the zoo or a config of one's own."""
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return cls.from_config(config)
        if isinstance(config, ViTConfig):
            return cls(config, next(iter(rows_like(config)), None)).eval()
        if not isinstance(config, str):
            raise InputTypeError(f"from_config takes a name or a ViTConfig, got {type(config).__name__}")
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
        adopted.info, adopted.preprocess = found.info, found.preprocess
        adopted.mixed_precision = False
        return adopted

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the same whichever layout they came from; see `checkpoints.fingerprint`."""
        return fingerprint(self.state_dict(), self.config)

    def save_pretrained(self, directory: str | os.PathLike[str], layout: LayoutName = "hf") -> Path:
        """Writes a directory that transformers loads ("hf") or timm ("timm"), or one file under Meta's names ("meta").

        Raises: UnsupportedError for a model that the layout cannot hold, InputError for a target of the wrong kind.
        """
        return save_checkpoint(self, directory, layout, self.info, self.preprocess)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | tuple[int, int] | None = None,
        dynamic: Dynamic = "batch",
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
        return export_model(self, path, self.preprocess, self.info, size=size, dynamic=dynamic, opset=opset)

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
        `card`: the README.md to write; None writes one where there is none yet.  It gives the licence of the model of
        the zoo that has this architecture, but for what `train` made from scratch: read it, and mend it for other
        weights that are yours alone.

        Raises: InputError for a wrong id or no token, GatedModelError without the right to write, OfflineError.
        """
        return push(
            self, repo_id, self.info, self.preprocess,
            private=private, revision=revision, token=token, commit_message=commit_message, card=card,
        )  # fmt: skip

    def train(self, mode: bool = True) -> Self:
        """As torch's; a model in training frees the memory of its fast path."""
        if mode:
            drop_plan(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        drop_plan(self)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        c = self.config
        positions = "RoPE" if c.position_grid is None else f"learned {c.position_grid}x{c.position_grid}"
        name = self.info.name if self.info else "own architecture"
        shape = f"{c.depth} blocks of width {c.embed_dim}, patch {c.patch_size}, {c.num_registers} registers"
        return f"{name}: {shape}, {positions}"


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device is 'auto', 'cpu', 'cuda', 'cuda:1' and the like; got {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, and this torch sees no CUDA; use 'auto' or 'cpu'")
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Of the linears; None for "auto"."""
    if dtype == "auto":
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise InputError(f"dtype is 'auto', float32, bfloat16, float16 or float64; got {dtype!r}")
    return resolved
