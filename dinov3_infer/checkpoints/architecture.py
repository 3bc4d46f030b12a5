"""The config of the network that a checkpoint holds, a ViT or a ConvNeXt.

The tensors show nearly all fields.  The number of heads, the epsilon of the norms and the RoPE base come from the
caller, from config.json, or from a named architecture.  A number of heads that nothing states is an error, not a guess.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..model.convnext import ConvNeXtConfig
from ..model.layers import ViTConfig
from ..model.positions import PositionResize
from ..zoo import ARCHITECTURES, MODELS, Config, ModelInfo
from .layouts import Layout, Parts
from .reading import Checkpoint
from .recognise import HF_EPS, Stored
from .stages import stage_eps, stages_shown
from .stated import Statement, stated

__all__ = ["architecture", "looks_like", "reading_differs", "rows_like", "same_architecture"]

_LONGEST = 2**18  # largest dimension: the rows of a 512 x 512 position table


def architecture(
    stored: Stored,
    checkpoint: Checkpoint,
    expected: ModelInfo | None,
    like: ModelInfo | None,
    num_heads: int | None = None,
) -> tuple[Config, dict[str, str]]:
    """The config of a stored backbone, and where its heads and epsilon were found.

    Args:
        stored: The tensors.
        checkpoint: The checkpoint with its config.json.
        expected: The model that the caller asked for.
        like: The model whose heads and epsilon are used if neither a live module nor config.json states them.
        num_heads: The number of heads that the caller states.

    Returns: The config, and for each stated field its source, such as "config.json".

    Raises:
        CheckpointError: The tensors are no whole network, contradict config.json or the caller, or nothing states the
            number of heads.
        InputError: The numbers do not fit each other.
        UnsupportedError: The network is not supported.
    """
    in_stages = stored.layout.family == "convnext"
    shown = stages_shown(stored, checkpoint.config) if in_stages else _shown(stored, checkpoint.config)
    if stored.layout.name == "hf" and not in_stages:
        _refuse_contradictions(shown, checkpoint.config)
    if expected is not None and not same_architecture(expected.config, shown):
        raise CheckpointError(
            f"it {looks_like(shown)}; you asked for {expected.name} {_size(vars(expected.config))}, so give its file "
            "or another name"
        )
    if in_stages:
        eps = stage_eps(checkpoint)
        return ConvNeXtConfig(**(shown | eps)), {"norm_eps": "config.json" if eps else "released ConvNeXts"}
    said = _statements(stored, checkpoint, shown, like, num_heads)
    fields, origin = dict(shown), dict[str, str]()
    for name in _STATED if shown["position_grid"] is None else _STATED[:2]:
        values = [(found[name], where) for found, where in said if name in found]
        if values:
            fields[name], origin[name] = values[0]
    heads = [(found["num_heads"], where) for found, where in said if "num_heads" in found and where not in _LIKENESS]
    other = next(((value, where) for value, where in heads if value != fields["num_heads"]), None)
    if other is not None and not checkpoint.known:
        raise CheckpointError(
            f"{origin['num_heads']} gives {fields['num_heads']} heads and {other[1]} gives {other[0]}; "
            "correct one of them"
        )
    if "num_heads" not in fields:
        raise CheckpointError(
            f"nothing states the number of attention heads for width {shown['embed_dim']}; pass num_heads= as the "
            "authors of the model state it"
        )
    if "norm_eps" not in fields:
        fields["norm_eps"] = _usual_eps(stored.layout, shown["key_bias"])
        likeness = any(where == _LIKENESS[0] for _, where in said)
        origin["norm_eps"] = _LIKENESS[0] if likeness else f"the default of the {stored.layout.label} layout"
    if shown["position_grid"] is None and "rope_base" not in origin:
        periods = stored.parts["rope_periods"].names[0] in stored.shapes if "rope_periods" in stored.parts else False
        family = f"released models of the {stored.layout.label} layout, which have one base"
        origin["rope_base"] = "the RoPE periods in the file" if periods else family
    return ViTConfig(**fields), origin


_LIKENESS = ("models of the same shape", "the default of models of the same width, depth and MLP")


def _statements(
    stored: Stored, checkpoint: Checkpoint, shown: Mapping[str, Any], like: ModelInfo | None, num_heads: int | None
) -> list[Statement]:
    """All statements of heads and epsilon, the strongest first."""
    periods = {"num_heads": shown["num_heads"]} if "num_heads" in shown else {}
    said: list[Statement] = [({"num_heads": num_heads}, "num_heads=")] if num_heads is not None else []
    said += [(dict(checkpoint.known), "the live module")] if checkpoint.known else []
    said += [(periods, "the RoPE periods in the file")] if periods else []
    said += stated(checkpoint.config, shown["embed_dim"], shown["gated"])
    if like is not None and isinstance(like.config, ViTConfig) and not checkpoint.known:
        names = _STATED[1:] if any("num_heads" in found for found, _ in said) else _STATED
        said.append(({name: getattr(like.config, name) for name in names}, like.name))
    known = [c for c in ARCHITECTURES.values() if isinstance(c, ViTConfig)]
    twin = next((c for c in known if same_architecture(c, shown)), None)
    if twin is not None:
        said.append(({"num_heads": twin.num_heads}, _LIKENESS[0]))
    near = {c.num_heads for c in known if all(getattr(c, n) == shown[n] for n in _NEAR)}
    if len(near) == 1:
        said.append(({"num_heads": near.pop()}, _LIKENESS[1]))
    return said


_STATED = ("num_heads", "norm_eps", "rope_base")  # fields that no tensor shows
_NEAR = ("embed_dim", "depth", "ffn_dim", "gated")


def _refuse_contradictions(shown: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a config.json of transformers contradicts the tensors."""
    names = {
        "num_hidden_layers": "depth", "hidden_size": "embed_dim", "patch_size": "patch_size",
        "num_register_tokens": "num_registers", "num_channels": "in_chans",
    }  # fmt: skip
    for name, ours in names.items() if str(stated.get("model_type")) in HF_EPS else ():
        if stated.get(name, shown[ours]) not in (shown[ours], [shown[ours]] * 2):  # a patch size may be a pair
            raise CheckpointError(
                f"config.json says {name} {reprlib.repr(stated[name])} and the tensors {shown[ours]}; "
                "is the file complete?"
            )


def _shown(stored: Stored, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ViTConfig that the tensors show.

    `config` is config.json, which may say which tokens have positions.

    Raises: CheckpointError if the tensors are no whole ViT.
    """
    layout, depth = stored.layout, stored.depth
    if not depth:
        raise CheckpointError(f"the names fit layout {layout.label}, but there are no blocks; is the file complete?")

    there = sum(
        any(name in stored.shapes for name in stored.parts[f"blocks.{n}.norm1.weight"].names) for n in range(depth)
    )
    if depth > 2 * there + 8:  # for smaller gaps the loader names the missing tensors
        raise CheckpointError(f"the names number {depth} blocks, but only {there} are there; is the file complete?")

    def shape(ours: str) -> tuple[int, ...] | None:
        """Shape of the first part of a row, in the first block that has all its parts; the loader reports gaps."""
        for block in range(depth if "#" in ours else 1):
            parts = stored.parts.get(ours.replace("#", str(block)))
            if parts is not None and all(name in stored.shapes or name in parts.optional for name in parts.names):
                found = stored.shapes[parts.names[0]]
                return found if max(found, default=0) <= _LONGEST else ()
        return None

    def needed(ours: str, dimensions: int) -> tuple[int, ...]:
        found = shape(ours)
        if found is None or len(found) != dimensions or 0 in found:
            parts = stored.parts.get(first := ours.replace("#", "0"))
            name, fault = parts.names[0] if parts else first, "missing" if found is None else f"of shape {list(found)}"
            raise CheckpointError(
                f"the names fit layout {layout.label}, but '{name}' is {fault}; is the file complete?"
            )
        return found

    if shape("cls_token") is None:
        raise CheckpointError(
            f"it has no class token ('{stored.parts['cls_token'].names[0]}'), and models without one (I-JEPA, SigLIP) "
            "are not supported; give a DINO model"
        )
    width = needed("cls_token", 3)[2]
    conv = needed("patch_embed.proj.weight", 4)
    if conv[2] != conv[3]:
        raise UnsupportedError(f"the patch embedding has shape {list(conv)}; only square patches are supported")
    fc2, gate_up = shape("blocks.#.mlp.fc2.weight"), shape("blocks.#.mlp.gate_up.weight")
    gated = gate_up is not None
    if gate_up is not None and layout.rows["blocks.#.mlp.gate_up.weight"] == layout.rows["blocks.#.mlp.fc1.weight"]:
        gated = (
            fc2 is not None and len(fc2) == 2 and gate_up[:1] == (2 * fc2[1],)
        )  # timm names the gated MLP of its giant like a plain one
    registers = shape("register_tokens")
    num_registers = registers[1] if registers is not None and len(registers) == 3 else 0
    positions = shape("pos_embed") if layout.family == "dinov3" else needed("pos_embed", 3)
    qkv_bias = shape("blocks.#.attn.qkv.bias") is not None
    shown: dict[str, Any] = dict(
        embed_dim=width,
        depth=depth,
        ffn_dim=needed(f"blocks.#.mlp.{'down' if gated else 'fc2'}.weight", 2)[1],
        gated=gated,
        patch_size=conv[2],
        in_chans=conv[1],
        num_registers=num_registers,
        position_grid=None if positions is None else _grid_side(stored, positions, num_registers, config),
        position_resize=_resize_rule(layout, num_registers),
        qkv_bias=qkv_bias,
        key_bias=_key_bias(stored) if qkv_bias else positions is not None,
        layerscale=shape("blocks.#.ls1.gamma") is not None,
        mask_token=shape("mask_token") is not None,
        prefix_norm=shape("cls_norm.weight") is not None,
        local_cls_norm=shape("local_cls_norm.weight") is not None,
    )
    periods = shape("rope_periods")
    if periods is not None and len(periods) == 1 and periods[0]:
        shown["num_heads"] = max(1, width // (4 * periods[0]))
    return shown


def _key_bias(stored: Stored) -> bool:
    """Whether the keys have a bias, which layouts store apart, mask out, or leave out."""
    biases = (stored.parts[f"blocks.{number}.attn.qkv.bias"] for number in range(stored.depth))
    optional = {name for parts in biases for name in parts.optional}
    present = not optional.isdisjoint(stored.shapes)
    return present if optional and stored.parts["blocks.0.attn.qkv.bias"].form == "joined" else not present


def _grid_side(stored: Stored, positions: tuple[int, ...], registers: int, config: Mapping[str, Any]) -> int:
    """Side of the grid of a position table, which has rows for no token before the patches, for one, or for all.

    Adapts `stored.parts` of the table, and of the registers if they have positions too.
    """
    parts, count = stored.parts["pos_embed"], positions[1]
    usual = 0 if parts.form == "folded" else 1
    sides = {before: math.isqrt(max(count - before, 0)) for before in dict.fromkeys((usual, 1 + registers, 0))}
    fits = [before for before, side in sides.items() if side and side * side == count - before]
    arguments = config.get("model_args")
    if isinstance(arguments, Mapping) and arguments.get("no_embed_class") is False:
        fits = fits[::-1]
    if not fits:
        raise UnsupportedError(
            f"the position table has shape {list(positions)}, which is no square grid after {usual} or {1 + registers} "
            "tokens; give a model with positions for square images"
        )
    if fits[0] == 0:
        stored.parts["pos_embed"] = Parts("folded", parts.names, parts.optional)
    elif registers and fits[0] == 1 + registers:
        stored.parts["pos_embed"] = Parts("cut", (*parts.names, stored.parts["register_tokens"].names[0]), frozenset())
        names = (*stored.parts["register_tokens"].names, *parts.names)
        stored.parts["register_tokens"] = Parts("placed", names, frozenset())
    return sides[fits[0]]


def _resize_rule(layout: Layout, num_registers: int) -> PositionResize:
    if num_registers or layout.name == "timm" or layout.family == "dinov3":
        return "antialias"
    return "offset" if layout.name == "meta" else "size"


def _usual_eps(layout: Layout, key_bias: bool) -> float:
    """The default epsilon of a layout whose file does not state it."""
    if layout.name == "meta" and layout.family == "dinov3" and key_bias:
        return 1e-6  # Meta's default training config has an unmasked key bias and this epsilon
    return 1e-5 if layout.family == "dinov3" else 1e-6


def reading_differs(config: Config, layout: Layout) -> list[str]:
    """Sentences about how other readers of a layout will differ from this model."""
    notes = []
    usual = _usual_eps(layout, isinstance(config, ViTConfig) and config.key_bias)
    if isinstance(config, ConvNeXtConfig):
        pass
    elif config.position_grid is not None and _resize_rule(layout, config.num_registers) != config.position_resize:
        notes.append(
            f"readers of the {layout.name} layout resize positions by another rule, "
            f"so features off the {config.position_grid}x{config.position_grid} grid will differ by 1 to 4 %"
        )
    if layout.name != "hf" and config.norm_eps != usual:
        notes.append(
            f"the {layout.name} layout does not store the norm epsilon {config.norm_eps:g}; its readers use {usual:g}"
        )
    return notes


_SHAPES = {  # the fields that determine the shapes of the tensors
    ViTConfig: (
        "embed_dim", "depth", "ffn_dim", "gated", "patch_size", "num_registers", "position_grid", "layerscale",
        "in_chans",
    ),
    ConvNeXtConfig: ("depths", "widths"),
}  # fmt: skip


def same_architecture(config: Config, other: Mapping[str, Any] | Config) -> bool:
    """Whether two configs have tensors of the same shapes, apart from tensors that some layouts leave out."""
    values = other if isinstance(other, Mapping) else vars(other)
    return all(name in values and getattr(config, name) == values[name] for name in _SHAPES[type(config)])


def rows_like(config: Config) -> list[ModelInfo]:
    """The models of the zoo with this architecture, the likeliest first."""
    rows = [row for row in MODELS.values() if same_architecture(row.config, config)]
    # only the satellite model of the two ViT-L was trained with this norm
    local = isinstance(config, ViTConfig) and config.local_cls_norm
    return sorted(rows, key=lambda row: not local or row.name != "dinov3_vitl16_sat493m")


def looks_like(config: Mapping[str, Any]) -> str:
    """The architectures that have these fields, as part of an error."""
    names = [name for name, known in ARCHITECTURES.items() if same_architecture(known, config)]
    kind = "ConvNeXt" if "widths" in config else "ViT"
    return f"looks like {' or '.join(names[:2])}" if names else f"looks like a {kind} {_size(config)}"


def _size(config: Mapping[str, Any]) -> str:
    if "widths" in config:
        return f"({' '.join(map(str, config['depths']))} blocks, {' '.join(map(str, config['widths']))} wide)"
    side = config["position_grid"]
    return (
        f"(embed_dim {config['embed_dim']}, {config['depth']} blocks, patch {config['patch_size']}, "
        f"{config['num_registers']} registers, {'RoPE' if side is None else f'positions {side}x{side}'})"
    )
