"""Which backbone a file holds, told by the names of its tensors: where it lies, and in which layout."""

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .layouts import LAYOUTS, Layout, LayoutName
from .reading import Checkpoint, TensorSource

__all__ = ["HF_EPS", "Stored", "layout_hint", "normalise", "recognise", "some"]

log = logging.getLogger("dinov3_infer")

# transformers' model types, and the epsilon that their config classes have where a config.json is silent
HF_EPS = {"dinov3_vit": 1e-5, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "vit": 1e-12, "dinov3_convnext": 1e-6}
_REFUSED = {
    "convnext": "a ConvNeXt of transformers' supervised kind; DINOv3's have model_type dinov3_convnext",
    "convnextv2": "a ConvNeXt of the second version, which has another normalisation in its blocks",
}
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_ANCHORS = re.compile(
    r"^(.*?)(?:patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?"
    r"|(?:model\.)?stages\.0\.(?:blocks\.|layers\.)?0\.(?:dwconv|conv_dw|depthwise_conv))\.weight$"
)


class Stored:
    """One backbone inside a file: its layout, the shapes of its tensors, and where each of ours lies among them."""

    def __init__(self, layout: Layout, tensors: TensorSource, names: Mapping[str, str]) -> None:
        """`names`: in the layout -> in the file."""
        self.layout, self.tensors, self.names = layout, tensors, names
        self.shapes = {name: tensors.shapes[original] for name, original in names.items()}
        self.dtypes = {name: tensors.dtypes[original] for name, original in names.items()}
        self.depth = layout.depth(names)
        self.parts = layout.parts(self.depth)


def recognise(checkpoint: Checkpoint, layout: LayoutName | None = None) -> Stored:
    """The backbone in a file: by its names, else by its config, else Meta's, said in one line.

    Raises: CheckpointError for names of no known layout or of two backbones, UnsupportedError for other networks.
    """
    groups = normalise(checkpoint.tensors.shapes)
    if not groups:
        raise CheckpointError(
            f"'{checkpoint.path}' holds no backbone of a known kind: {_what_is_there(checkpoint.tensors)}"
        )
    prefix = _choose_prefix(checkpoint, list(groups))
    group = groups[prefix]
    candidates = _layouts_of(group, layout)
    if not candidates:
        if "rope_periods" in group:
            raise CheckpointError(
                f"'{checkpoint.path}' is the state_dict of a Backbone, without its config; "
                "save it with save_pretrained, or give it to load_state_dict"
            )
        kinds = "layout" if layout is None else f"layout {layout!r}"
        raise CheckpointError(f"the names in '{checkpoint.path}' are those of no known {kinds}: {some(group)}")
    chosen = candidates[0]
    others = " or ".join(sorted({repr(c.name) for c in candidates} - {repr(chosen.name)}))
    if others:
        hint = layout_hint(checkpoint.config)
        chosen = next((c for c in candidates if c.name == hint), chosen)
        if chosen.name != hint:
            log.warning(
                "%s: %s and %s use the same names here; taken as %r, pass layout=%s to resize positions by its rule",
                checkpoint.path, chosen.name, others, chosen.name, others,
            )  # fmt: skip
    if prefix:
        log.info(
            "%s: took %d tensors under '%s', left %d others aside",
            checkpoint.path, len(group), prefix, len(checkpoint.tensors.shapes) - len(group),
        )  # fmt: skip
    spelled: dict[str, str] = {}
    for name, original in group.items():
        for pattern, replacement in chosen.spellings:
            name = re.sub(pattern, replacement, name)
        spelled[name] = original
    return Stored(chosen, checkpoint.tensors, spelled)


def normalise(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Groups the names of a file by backbone: prefix -> {name without wrappers and prefix: name in the file}.

    Where a backbone begins is told by its patch embedding, or by the first convolution of its first stage.  Names under
    no such prefix are in no group.
    """
    clean = {_WRAPPERS.sub("", name): name for name in names}
    prefixes = {match[1] for name in clean if (match := _ANCHORS.match(name))}
    ordered = sorted(clean)  # those of a prefix lie together, so that thousands of prefixes take no longer than one

    def under(prefix: str) -> list[str]:
        start = bisect_left(ordered, prefix)
        return ordered[start : bisect_right(ordered, prefix, start, key=lambda name: name[: len(prefix)])]

    return {p: {name[len(p) :]: clean[name] for name in under(p)} for p in sorted(prefixes)}


def _choose_prefix(checkpoint: Checkpoint, prefixes: list[str]) -> str:
    teachers = [p for p in prefixes if re.search(r"(^|\.|_)(teacher|ema)", p) and "gram" not in p]
    chosen = prefixes if len(prefixes) == 1 else teachers
    if len(chosen) != 1:
        raise CheckpointError(
            f"'{checkpoint.path}' holds {len(prefixes)} backbones, under {', '.join(map(repr, prefixes))}; "
            "save the one you want on its own"
        )
    return chosen[0]


def _layouts_of(names: Collection[str], layout: LayoutName | None) -> list[Layout]:
    """The layouts that these names (without prefix) can be, of the kind `layout` if given."""

    def any_matches(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in names)

    return [
        candidate
        for candidate in LAYOUTS
        if layout in (None, candidate.name)
        and all(any_matches(p) for p in candidate.has)
        and not any(any_matches(p) for p in candidate.lacks)
    ]


def layout_hint(config: Mapping[str, Any]) -> LayoutName | None:
    """Whose config.json this is: "hf", "timm" or None.  Raises UnsupportedError for models that are not here."""
    kind = str(config.get("model_type"))
    if kind in _REFUSED:
        raise UnsupportedError(f"this checkpoint is {_REFUSED[kind]}")
    if "architecture" in config or "pretrained_cfg" in config:
        return "timm"
    return "hf" if kind in HF_EPS else None


def some(names: Iterable[str], most: int = 8) -> str:
    """The first names of many, for an error."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f", ... ({len(listed) - most} more)" if len(listed) > most else "")


def _what_is_there(tensors: TensorSource) -> str:
    names = list(tensors.shapes)
    found = (
        (
            r"dwconv|conv_dw|depthwise_conv",
            f"it may be a ConvNeXt, and its first block is not there ({some(names, 3)})",
        ),
        (r"head|decoder|classifier", f"it looks like a head without its backbone ({some(names, 3)})"),
        (r"", f"no patch embedding among its {len(names)} tensors ({some(names, 3)})"),
    )
    return next((what for pattern, what in found if any(re.search(pattern, n) for n in names)), "it has no tensors")
