"""Recognises the backbone in a file by its tensor names: its prefix and its layout."""

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .layouts import LAYOUTS, OURS, Layout, LayoutName
from .reading import Checkpoint, TensorSource
from .refusals import refuse_config, refuse_tensors

__all__ = ["HF_EPS", "Stored", "layout_hint", "normalise", "recognise", "some"]

log = logging.getLogger("dinov3_infer")

# transformers' model types, and the default epsilon of their config classes
HF_EPS = {"dinov3_vit": 1e-5, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "vit": 1e-12, "dinov3_convnext": 1e-6}
_REFUSED = {
    "convnext": "a supervised ConvNeXt of transformers; DINOv3's have model_type dinov3_convnext",
    "convnextv2": "a ConvNeXt V2, which has another normalisation in its blocks",
}
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# other parts of a training checkpoint, and classifiers or poolers
_OF_TRAINING = re.compile(
    r"((model|module)\.)*(student|teacher|ema|gram|head|dino_|ibot_|optimizer|classifier|pooler)\w*(\.|$)"
)
_ADAPTERS = re.compile(r"(^|[._])(lora_[a-zA-Z]|base_layer|hada_w|lokr_w|ia3_l|oft_[rs]|modules_to_save|vera_lambda)")
_ANCHORS = re.compile(
    r"^(.*?)(?:patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?"
    r"|(?:model\.)?stages\.0\.(?:blocks\.|layers\.)?0\.(?:dwconv|conv_dw|depthwise_conv))\.weight$"
)


class Stored:
    """One backbone inside a file: its layout, the shapes of its tensors, and the place of each of ours."""

    def __init__(self, layout: Layout, tensors: TensorSource, names: Mapping[str, str]) -> None:
        """`names`: name in the layout -> name in the file."""
        self.layout, self.tensors, self.names = layout, tensors, names
        self.shapes = {name: tensors.shapes[original] for name, original in names.items()}
        self.dtypes = {name: tensors.dtypes[original] for name, original in names.items()}
        self.depth = layout.depth(names)
        self.parts = layout.parts(self.depth)


def recognise(checkpoint: Checkpoint, layout: LayoutName | None = None, named: bool = False) -> Stored:
    """Recognise the backbone in a file.

    Where two layouts have the same names, config.json decides, else Meta's layout is used with a warning.

    Args:
        checkpoint: The file.
        layout: The layout, if the caller states it.
        named: The caller names the model, so the state_dict of a Backbone is enough.

    Raises:
        CheckpointError: The names fit no known layout, or there are two backbones.
        UnsupportedError: The network is not supported.
    """
    _refuse_adapters(checkpoint)
    _refuse_windows(checkpoint.config)
    refuse_config(checkpoint.config, checkpoint.path)
    groups = normalise(checkpoint.tensors.shapes)
    if not groups:
        raise CheckpointError(
            f"'{checkpoint.path}' holds no backbone of a known kind: {_what_is_there(checkpoint.tensors)}"
        )
    prefix = _choose_prefix(checkpoint, list(groups))
    group = groups[prefix]
    tokens = (checkpoint.tensors.shapes.get(group.get(name, "")) for name in ("cls_token", "embeddings.cls_token"))
    refuse_tensors(group, next(filter(None, tokens), None), checkpoint.path)
    own = _layouts_of(group, None, OURS)
    candidates = own[:1] if named and own else _layouts_of(group, layout)
    if own and not named or not candidates:
        if own:
            raise CheckpointError(
                f"'{checkpoint.path}' is the state_dict of a Backbone without its config; "
                "give the model's name too, as from_pretrained(name, weights=...), or save it with save_pretrained"
            )
        kinds = "layout" if layout is None else f"layout {layout!r}"
        raise CheckpointError(f"the names in '{checkpoint.path}' fit no known {kinds}: {some(group)}")
    chosen = candidates[0]
    others = " or ".join(sorted({repr(c.name) for c in candidates} - {repr(chosen.name)}))
    if others:
        hint = layout_hint(checkpoint.config)
        chosen = next((c for c in candidates if c.name == hint), chosen)
        if chosen.name != hint:
            log.warning(
                "%s: %s and %s use the same names; read as %r, pass layout=%s to resize positions by its rule",
                checkpoint.path, chosen.name, others, chosen.name, others,
            )  # fmt: skip
    if prefix:
        left = {original for original in checkpoint.tensors.shapes if original not in set(group.values())}
        larger = [name for name in left if not _OF_TRAINING.match(name)]
        log.log(
            logging.WARNING if larger else logging.INFO,
            "%s: read the %d tensors under '%s', ignored %d others%s",
            checkpoint.path, len(group), prefix, len(left),
            f"; they belong to a larger model ({some(sorted(larger), 3)}), of which only the backbone is used"
            if larger else "",
        )  # fmt: skip
    if "fc_norm.weight" in group and "norm.weight" not in group:  # timm models that pool before their norm
        log.warning(
            "%s: timm applies its norm after the mean of the patches, this package to every token, so means differ",
            checkpoint.path,
        )
        group = {re.sub(r"^fc_norm\.", "norm.", name): original for name, original in group.items()}
    spelled: dict[str, str] = {}
    for name, original in group.items():
        for pattern, replacement in chosen.spellings:
            name = re.sub(pattern, replacement, name)
        spelled[name] = original
    return Stored(chosen, checkpoint.tensors, spelled)


def _refuse_adapters(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for adapters, with or without the model that they were injected into."""
    names = checkpoint.tensors.shapes
    found = next((name for name in names if _ADAPTERS.search(name)), None)
    if found is None:
        return
    whole = any(re.search(r"patch_embed", name) for name in names)
    what = "a model with an adapter that is not merged" if whole else "an adapter without its model"
    raise CheckpointError(
        f"'{checkpoint.path}' is {what} ('{found}'); merge it (peft: PeftModel.from_pretrained(model, adapter)"
        ".merge_and_unload()), and save the result"
    )


def normalise(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Group the names in a file by backbone: prefix -> {name without wrappers and prefix: name in the file}.

    A prefix is found by the patch embedding, or by the first convolution of the first stage.  Names under no prefix are
    in no group.
    """
    clean = {_WRAPPERS.sub("", name): name for name in names}
    prefixes = {match[1] for name in clean if (match := _ANCHORS.match(name))}
    ordered = sorted(clean)  # sorted names of a prefix are adjacent, so that thousands of prefixes stay fast

    def under(prefix: str) -> list[str]:
        start = bisect_left(ordered, prefix)
        return ordered[start : bisect_right(ordered, prefix, start, key=lambda name: name[: len(prefix)])]

    return {p: {name[len(p) :]: clean[name] for name in under(p)} for p in sorted(prefixes)}


def _refuse_windows(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError if a config, at any depth, states attention inside windows."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _refuse_windows(value)
        elif re.fullmatch("num_windows|window_size|window_block_indexes|window_block_indices", str(name)) and value:
            raise UnsupportedError(
                f"config.json states {name}: windowed attention is not supported; use the library of this model"
            )


def _choose_prefix(checkpoint: Checkpoint, prefixes: list[str]) -> str:
    teachers = [p for p in prefixes if re.search(r"(^|\.|_)(teacher|ema)", p) and "gram" not in p]
    chosen = prefixes if len(prefixes) == 1 else teachers
    if len(chosen) != 1:
        raise CheckpointError(
            f"'{checkpoint.path}' holds {len(prefixes)} backbones, under {', '.join(map(repr, prefixes))}; "
            "save the one you want in a separate file"
        )
    return chosen[0]


def _layouts_of(names: Collection[str], layout: LayoutName | None, known: tuple[Layout, ...] = LAYOUTS) -> list[Layout]:
    """The layouts that fit these names (without prefix), only those named `layout` if it is given."""

    def any_matches(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    return [
        candidate
        for candidate in known
        if layout in (None, candidate.name)
        and all(any_matches(p) for p in candidate.has)
        and not any(any_matches(p) for p in candidate.lacks)
    ]


def layout_hint(config: Mapping[str, Any]) -> LayoutName | None:
    """The library of a config.json: "hf", "timm" or None.  Raises UnsupportedError for unsupported models."""
    kind = str(config.get("model_type"))
    if kind in _REFUSED:
        raise UnsupportedError(f"this checkpoint is {_REFUSED[kind]}")
    if "architecture" in config or "pretrained_cfg" in config:
        return "timm"
    return "hf" if kind in HF_EPS else None


def some(names: Iterable[str], most: int = 8) -> str:
    """The first names of many, for a message."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f", ... ({len(listed) - most} more)" if len(listed) > most else "")


def _what_is_there(tensors: TensorSource) -> str:
    names = list(tensors.shapes)
    found = (
        (
            r"dwconv|conv_dw|depthwise_conv",
            f"it may be a ConvNeXt without its first block ({some(names, 3)})",
        ),
        (r"head|decoder|classifier", f"it looks like a head without its backbone ({some(names, 3)})"),
        (r"", f"no patch embedding among its {len(names)} tensors ({some(names, 3)})"),
    )
    return next((what for pattern, what in found if any(re.search(pattern, n) for n in names)), "it has no tensors")
