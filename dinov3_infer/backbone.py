"""The surface: load a backbone, give it pictures, save it."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import nn

from .checkpoints.config_json import layout_hint, same_architecture
from .checkpoints.export import Dynamic, export_model
from .checkpoints.loading import LayoutName, Periods, fingerprint, load_model
from .checkpoints.reading import CONFIG, PROCESSOR, Checkpoint, TensorsInMemory, open_checkpoint
from .checkpoints.saving import save_checkpoint
from .errors import CheckpointError, InputError, InputTypeError, check_choice
from .features.extractor import FeatureExtractor
from .hub.locate import HubOptions, locate, locate_file
from .hub.publish import push
from .images.preprocess import Preprocess
from .model.attention import resolve_attention
from .model.cpu.compiled import start_compiler
from .model.dispatch import Mode, drop_plan
from .model.vit import ViTConfig
from .zoo import MODELS, OWN, ModelInfo, Style, find, preprocess_of

__all__ = ["Backbone"]

log = logging.getLogger("dinov3_infer")


class Backbone(FeatureExtractor):
    """A DINO-family vision transformer with its weights and the transform of its pictures.

    An ordinary module: `.to`, `state_dict`, compile, export, DDP and adapters work.  `extract_features` takes pictures,
    calling it takes normalised pixels.
    """

    def __init__(self, config: ViTConfig, info: ModelInfo | None = None) -> None:
        super().__init__(config, _transform(config, info))
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
        options = HubOptions(revision, token, cache_dir, local_files_only)
        if weights is None:
            path, info = locate(name, options)
        else:
            asked = find(os.fspath(name))  # a typo is found before gigabytes are downloaded
            path = locate_file(weights, options)
            info = _as_named(asked, path)
        checkpoint = open_checkpoint(path)
        model, found = load_model(
            cls, checkpoint, layout=layout, expected=info, dtype=cast, device=target_device, periods=rope_periods
        )
        model.info = info or _row_of(model.config, path, checkpoint.config)
        model.preprocess = _with_stored_statistics(_transform(model.config, model.info, preprocessing), checkpoint)
        model.set_attention(attn_implementation)
        model.mode = mode
        model.mixed_precision = cast is None  # an explicit dtype is meant
        if cast == torch.float16:
            log.warning(
                "DINO models are trained in bfloat16 and float16 can overflow; results are checked, "
                "and bfloat16 is the safer choice"
            )
        log.debug(
            "%s: layout %s, %s", path, found.label, model.info.name if model.info else "an architecture of its own"
        )
        return model

    @classmethod
    def from_config(cls, config: str | ViTConfig, *, seed: int | None = None) -> Self:
        """Random weights, for tests and for training from scratch: a name of the zoo or a config of one's own."""
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return cls.from_config(config)
        if isinstance(config, ViTConfig):
            return cls(config, _row_of(config)).eval()
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
        configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        stated = [c.to_dict() for c in configs if hasattr(c, "to_dict") and layout_hint(c.to_dict()) == "hf"]
        tensors = TensorsInMemory(model.state_dict(keep_vars=True))
        checkpoint = Checkpoint(
            f"a live {type(model).__name__}", tensors, stated[0] if stated else _timm_settings(model)
        )
        settings = None if stated else _live_settings(model)
        adopted, _ = load_model(cls, checkpoint, layout=_live_layout(model), keep=True, settings=settings)
        adopted.mixed_precision = False
        adopted.info = _row_of(adopted.config, None, checkpoint.config)
        adopted.preprocess = _with_stored_statistics(_transform(adopted.config, adopted.info), checkpoint)
        return adopted

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the same whichever layout they came from; see `weights.fingerprint`."""
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


def _as_named(info: ModelInfo, weights: Path) -> ModelInfo:
    """The row that was asked for, unless the file is named as that of another one."""
    named = next((row for row in MODELS.values() if row.meta_file == weights.stem), info)
    if named is not info:
        raise CheckpointError(f"'{weights}' has the name of {named.name}'s file; ask for that, or rename the file")
    return info


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


def _row_of(config: ViTConfig, path: Path | None = None, stored: Mapping[str, Any] | None = None) -> ModelInfo | None:
    """The row of the zoo with this architecture; among equals the one that config.json or the file's name speaks of.

    Of weights that began as random ones, as config.json says, it has no licence.
    """
    rows = [row for row in MODELS.values() if same_architecture(row.config, config)]
    stored = stored or {}
    ours, timm = stored.get("dinov3_infer"), stored.get("pretrained_cfg")
    ours = ours if isinstance(ours, dict) else {}
    if ours.get("from_scratch") is True:
        rows = [replace(row, licence=OWN) for row in rows]
    if len(rows) < 2:
        return rows[0] if rows else None
    name = ours.get("name")
    tag = f".{timm.get('tag')}" if isinstance(timm, dict) else "."
    for row in rows:
        # of the two ViT-L the satellite model alone was trained with this norm
        satellite = config.local_cls_norm and row.name == "dinov3_vitl16_sat493m"
        if row.name == name or (row.timm_id or "").endswith(tag) or (path and row.meta_file == path.stem) or satellite:
            return row
    return rows[0]


def _transform(config: ViTConfig, info: ModelInfo | None, style: Style | None = None) -> Preprocess:
    """That of a row; for an architecture of one's own ImageNet's mean and std, and 16 patches a side."""
    if info is not None:
        return preprocess_of(info, style)
    if style is not None:
        raise InputError(
            f"preprocessing={style!r} needs a known architecture, and this model has its own; leave it out"
        )
    first = next(iter(MODELS.values()))
    return Preprocess(first.mean, first.std, config.patch_size, size=16 * config.patch_size)


def _with_stored_statistics(transform: Preprocess, checkpoint: Checkpoint) -> Preprocess:
    """The same with mean and std of what lies beside the weights, where that says so."""
    timm = checkpoint.config.get("pretrained_cfg")
    sources = (checkpoint.processor, timm if isinstance(timm, Mapping) else {}, checkpoint.config)
    for source in sources:
        mean, std = source.get("image_mean", source.get("mean")), source.get("image_std", source.get("std"))
        if isinstance(mean, (list, tuple)) and isinstance(std, (list, tuple)) and len(mean) == len(std) == 3:
            try:
                return replace(transform, mean=tuple(mean), std=tuple(std))
            except InputError as error:
                file = PROCESSOR if source is checkpoint.processor else CONFIG
                raise CheckpointError(f"{file} of '{checkpoint.path}' is wrong: {error}; mend it") from None
    return transform


def _live_settings(model: nn.Module) -> dict[str, Any]:
    """What a timm or Meta module knows and its tensors do not show."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith("blocks.0.attn") and isinstance(getattr(module, "num_heads", None), int):
            found["num_heads"] = module.num_heads
        if name.endswith("blocks.0.norm1") and isinstance(getattr(module, "eps", None), float):
            found["norm_eps"] = module.eps
    return found


def _timm_settings(model: nn.Module) -> dict[str, Any]:
    """timm's config.json of a live module, as far as it knows which weights it holds."""
    found = (getattr(module, "pretrained_cfg", None) for module in model.modules())
    cfg: Any = next((c for c in found if c), {})
    return {"pretrained_cfg": dict(cfg.to_dict() if hasattr(cfg, "to_dict") else cfg)} if cfg else {}


def _live_layout(model: nn.Module) -> LayoutName | None:
    origins = {type(module).__module__.split(".")[0] for module in model.modules()}
    return "timm" if "timm" in origins else "hf" if "transformers" in origins else None
