"""Checkpoint in, model out: strict both ways, whatever the layout.

Reading is driven by the tensors that the model needs, so that a missing one is found by construction; whatever is left
over in the file and not listed as unused is an error too.
"""

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, UnsupportedError
from ..model.network import Network
from ..model.rope import rope_periods
from ..model.vit import ViTConfig
from ..zoo import ARCHITECTURES, ModelInfo
from . import layouts
from .config_json import complete, contradiction, layout_hint, same_architecture, settings_from_config, shown_by_shapes
from .layouts import Folded, Joined, Layout, Masked, Nested, row_of, sources
from .reading import Checkpoint, TensorSource

__all__ = ["LayoutName", "Periods", "fingerprint", "load_model"]

log = logging.getLogger("dinov3_infer")

LayoutName = Literal["hf", "meta", "timm"]
Periods = Literal["exact", "bfloat16"]
M = TypeVar("M", bound=Network)


@dataclass(frozen=True)
class _Group:
    """One backbone inside a file: its layout, and its tensors by the layout's names."""

    layout: Layout
    tensors: TensorSource
    names: Mapping[str, str]  # in the layout -> in the file

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shapes[self.names[name]]

    def read(self, name: str, *, copying: bool = False) -> Tensor:
        return self.tensors.read(self.names[name], copying=copying)


def load_model(
    make: Callable[[ViTConfig], M],
    checkpoint: Checkpoint,
    *,
    layout: LayoutName | None = None,
    expected: ModelInfo | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    periods: Periods | None = None,
    keep: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> tuple[M, Layout]:
    """The model that a checkpoint holds, in eval mode.

    `dtype` is that of the linears and the convolution, everything else is float32; `None` leaves all float32.
    `keep` takes tensors as they are, dtype and device too.
    `expected` is what the caller asked for: a file of another size is refused with both names.
    `settings` are fields of the config that the caller knows better than config.json.

    Raises: CheckpointError for tensors that are missing, left over, misshapen or not finite where that matters.
    """
    group = _find_group(checkpoint, layout)
    try:
        config, note = _config_of(group, checkpoint.config, expected, settings)
    except (CheckpointError, InputError) as error:
        raise CheckpointError(f"'{checkpoint.path}' does not fit: {error}") from None
    except UnsupportedError as error:
        raise UnsupportedError(f"'{checkpoint.path}': {error}") from None
    if note:
        log.warning("%s: %s", checkpoint.path, note)
    with torch.device("meta"):
        model = make(config)
    rows = _account(model, group, checkpoint.path)
    if keep:
        device = group.read(next(iter(group.names))).device
    _fill(model, group, rows, None if keep else (dtype or torch.float32), torch.device(device))
    _settle_periods(model, checkpoint, periods, torch.device(device))
    return model.eval(), group.layout


def _find_group(checkpoint: Checkpoint, layout: LayoutName | None) -> _Group:
    """The backbone in a file: by its names, else by its config, else Meta's, said in one line."""
    groups = layouts.normalise(checkpoint.tensors.shapes)
    if not groups:
        raise CheckpointError(f"'{checkpoint.path}' holds no vision transformer: {_what_is_there(checkpoint.tensors)}")
    prefix = _choose_prefix(checkpoint, list(groups))
    candidates = layouts.recognise(groups[prefix], layout)
    if not candidates:
        if "rope_periods" in groups[prefix]:
            raise CheckpointError(
                f"'{checkpoint.path}' is the state_dict of a Backbone, without its config; "
                "save it with save_pretrained, or give it to load_state_dict"
            )
        kinds = "layout" if layout is None else f"layout {layout!r}"
        raise CheckpointError(
            f"the names in '{checkpoint.path}' are those of no known {kinds}: {_some(groups[prefix])}"
        )
    chosen = candidates[0]
    if len({c.name for c in candidates}) > 1:
        hint = layout_hint(checkpoint.config)
        named = [c for c in candidates if c.name == hint]
        if named:
            chosen = named[0]
        else:
            others = " or ".join(sorted({repr(c.name) for c in candidates} - {repr(chosen.name)}))
            log.warning(
                "%s: %s and %s use the same names here; taken as %r, pass layout=%s to resize positions by its rule",
                checkpoint.path, chosen.name, others, chosen.name, others,
            )  # fmt: skip
    if prefix:
        taken, aside = len(groups[prefix]), len(checkpoint.tensors.shapes) - len(groups[prefix])
        log.info("%s: took %d tensors under '%s', left %d others aside", checkpoint.path, taken, prefix, aside)
    spelled: dict[str, str] = {}
    for name, original in groups[prefix].items():
        for pattern, replacement in chosen.spellings:
            name = re.sub(pattern, replacement, name)
        spelled[name] = original
    return _Group(chosen, checkpoint.tensors, spelled)


def _config_of(
    group: _Group, stated: Mapping[str, Any], expected: ModelInfo | None, settings: Mapping[str, Any] | None
) -> tuple[ViTConfig, str | None]:
    """The config of a backbone, checked against what config.json and the caller say; and what had to be assumed."""
    known = dict(settings or settings_from_config(stated))
    if not known and expected is not None:
        known = {"num_heads": expected.config.num_heads, "norm_eps": expected.config.norm_eps}
    shown = shown_by_shapes(group.layout, {name: group.shape(name) for name in group.names})
    if group.layout.name == "hf" and (fault := contradiction(shown, stated)):
        raise CheckpointError(f"{fault}; is the file whole?")
    if expected is not None and not same_architecture(expected.config, shown):
        raise CheckpointError(
            f"it {_looks_like(shown)}; you asked for {expected.name} {_shape_of(vars(expected.config))}"
        )
    return complete(shown, group.layout, known)


def _choose_prefix(checkpoint: Checkpoint, prefixes: list[str]) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    teachers = [p for p in prefixes if re.search(r"(^|\.|_)(teacher|ema)", p) and "gram" not in p]
    if len(teachers) == 1:
        return teachers[0]
    listed = ", ".join(repr(p) for p in prefixes)
    raise CheckpointError(
        f"'{checkpoint.path}' holds {len(prefixes)} backbones, under {listed}; save the one you want on its own"
    )


def _account(model: Network, group: _Group, path: str) -> dict[str, tuple[layouts.Row, list[str]]]:
    """Where each tensor of the model lies in the file; raises for whatever is missing, left over or misshapen."""
    in_any_block = {_any_block(name) for name in group.names}
    rows: dict[str, tuple[layouts.Row, list[str]]] = {}
    faults: dict[str, list[str]] = defaultdict(list)
    used: set[str] = set()
    for ours, target in model.state_dict().items():
        row, number = row_of(group.layout, ours)
        if row is None:
            faults["missing"].extend([ours] if ours != "rope_periods" else [])  # those can be computed
            continue
        parts = sources(row, number)
        names = [name for name, _ in parts]
        used.update(names)
        absent = [n for n, needed in parts if n not in group and (needed or _any_block(n) in in_any_block)]
        faults["missing"].extend(absent)
        if absent:
            continue
        stored = {name: group.tensors.dtypes[group.names[name]] for name in names if name in group}
        faults["not stored as floating point numbers"].extend(name for name, kind in stored.items() if kind is None)
        if _shape_of_row(row, names, group) != tuple(target.shape):
            found = f"{names[0]} {list(group.shape(names[0]))} for our {ours} {list(target.shape)}"
            faults["of another shape"].append(found)
        rows[ours] = row, names
    unused = "|".join(group.layout.unused) or r"(?!)"
    faults["left over"] = [
        name
        for name in group.names
        if name not in used and 0 not in group.shape(name) and not re.fullmatch(unused, name)
    ]
    if any(faults.values()):
        counts = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names)
        raise CheckpointError(
            f"'{path}' does not fit (layout {group.layout.label}, {_looks_like(vars(model.config))}): {counts}"
        )
    return rows


def _any_block(name: str) -> str:
    """The name with its block number taken out: what one block has, all have."""
    return re.sub(r"\.\d+\.", ".#.", name, count=1)


def _shape_of_row(row: layouts.Row, names: list[str], group: _Group) -> tuple[int, ...]:
    """The shape that our tensor gets from its parts in the file; () where they do not go together."""
    shapes = [group.shape(name) if name in group else None for name in names]
    first = shapes[0]
    assert first is not None
    if isinstance(row, Joined):
        if not all(shape is None or (shape and shape[1:] == first[1:]) for shape in shapes):
            return ()
        return (sum((shape or first)[0] for shape in shapes), *first[1:])
    if isinstance(row, Masked) and shapes[1] not in (None, first):
        return ()
    if isinstance(row, Folded):
        return (first[0], first[1] + 1, *first[2:]) if len(first) > 1 else ()
    return first[1:] if isinstance(row, Nested) and first[:1] == (1,) else first


@torch.no_grad()
def _fill(
    model: Network,
    group: _Group,
    rows: Mapping[str, tuple[layouts.Row, list[str]]],
    dtype: torch.dtype | None,  # None: as stored
    device: torch.device,
) -> None:
    """Reads what `_account` found."""
    matrices = _matrix_names(model)
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for ours, (row, names) in rows.items():
        want = dtype if dtype is None or ours in matrices else torch.promote_types(dtype, torch.float32)
        want = want or group.tensors.dtypes[group.names[names[0]]] or torch.float32
        tensor = _read(row, names, group, torch.float32 if ours == "rope_periods" else want, device)
        if ours in parameters:
            if dtype is None:  # taken as it is, so what is frozen stays frozen; assigning would unfreeze it
                parameters[ours].requires_grad_(any(group.read(name).requires_grad for name in names if name in group))
            if not isinstance(tensor, nn.Parameter):  # a live module's own parameter is shared
                tensor = nn.Parameter(tensor, requires_grad=parameters[ours].requires_grad)
        state[ours] = tensor
    result = model.load_state_dict(state, strict=False, assign=True)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"rope_periods"}


def _matrix_names(model: Network) -> set[str]:
    """Parameters that matrix products use: these alone take a lower precision."""
    return {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for kind in ("weight", "bias")
    }


def _read(row: layouts.Row, names: list[str], group: _Group, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor of ours."""
    if isinstance(row, Joined):
        first = group.shape(names[0])
        lengths = [group.shape(name)[0] if name in group else first[0] for name in names]
        joined = torch.zeros(sum(lengths), *first[1:], dtype=dtype, device=device)
        for target, name in zip(joined.split(lengths), names, strict=True):
            if name in group:
                target.copy_(group.read(name, copying=True))
        return joined
    tensor = group.read(names[0])
    if isinstance(row, Masked) and names[1] in group:
        mask = group.read(names[1])
        if not mask.isfinite().all():
            raise CheckpointError(f"'{names[1]}' holds NaN: the model was saved before init_weights ran; save it again")
        tensor = tensor * mask.to(tensor.dtype)
    elif isinstance(row, Nested):
        tensor = tensor.squeeze(0)
    elif isinstance(row, Folded):
        tensor = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
    return tensor.to(device, dtype)


def _settle_periods(model: Network, checkpoint: Checkpoint, periods: Periods | None, device: torch.device) -> None:
    """RoPE periods: as asked, else as stored in the file or in our block of config.json, else exact."""
    if model.rope_periods is None:
        return
    ours = checkpoint.config.get("dinov3_infer")
    stored = ours.get("rope_periods") if isinstance(ours, dict) else None
    exact = rope_periods(model.config.head_dim, model.config.rope_base)
    if periods is not None:
        model.rope_periods = (exact.bfloat16().float() if periods == "bfloat16" else exact).to(device)
    elif isinstance(stored, list) and len(stored) == len(exact) and all(isinstance(v, float) for v in stored):
        model.rope_periods = torch.tensor(stored, dtype=torch.float32, device=device)
    elif model.rope_periods.is_meta:
        model.rope_periods = exact.to(device)
    if not model.rope_periods.is_meta and not ((model.rope_periods > 0) & model.rope_periods.isfinite()).all():
        raise CheckpointError(f"'{checkpoint.path}' holds RoPE periods of 0, below or infinite; download it again")


def _looks_like(config: Mapping[str, Any]) -> str:
    names = [name for name, known in ARCHITECTURES.items() if same_architecture(known, config)]
    return f"looks like {' or '.join(names[:2])}" if names else f"looks like a ViT {_shape_of(config)}"


def _shape_of(config: Mapping[str, Any]) -> str:
    side = config["position_grid"]
    return (
        f"(embed_dim {config['embed_dim']}, {config['depth']} blocks, patch {config['patch_size']}, "
        f"{config['num_registers']} registers, {'RoPE' if side is None else f'positions {side}x{side}'})"
    )


def _some(names: Any, most: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f", ... ({len(listed) - most} more)" if len(listed) > most else "")


def _what_is_there(tensors: TensorSource) -> str:
    names = list(tensors.shapes)
    if not names:
        return "it has no tensors"
    if any(re.search(r"dwconv|conv_dw|depthwise_conv", name) for name in names):
        return "it is a ConvNeXt, which is not here; timm has DINOv3's as convnext_*.dinov3_lvd1689m"
    if any("head" in name or "decoder" in name or "classifier" in name for name in names):
        return f"it looks like a head without its backbone ({_some(names, 3)})"
    return f"no patch embedding among its {len(names)} tensors ({_some(names, 3)})"


def fingerprint(state: Mapping[str, Tensor], config: ViTConfig) -> str:
    """SHA-256 over the tensors that features depend on, the same for the same weights in every layout.

    Left out are what some layouts do not store: mask token, norm for local crops, RoPE periods.  Biases that are zero
    count as absent, and the class token includes its position, as in timm's files.
    """
    digest = hashlib.sha256()
    canonical = {
        name: tensor for name, tensor in state.items() if not re.match(r"mask_token|local_cls_norm|rope_periods", name)
    }
    if config.position_grid is not None:
        canonical["cls_token"] = state["cls_token"].float() + state["pos_embed"][:, :1].float()
        canonical["pos_embed"] = state["pos_embed"][:, 1:]
    for name in sorted(canonical):
        tensor = canonical[name].detach().to("cpu", torch.float32)
        if name.endswith("attn.qkv.bias") and not config.key_bias:
            tensor = torch.cat([part * keep for part, keep in zip(tensor.chunk(3), (1.0, 0.0, 1.0), strict=True)])
        if name.endswith("attn.qkv.bias") and not tensor.any():
            continue
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update((tensor + 0.0).contiguous().numpy().data)  # + 0.0: minus zero counts as zero
    return digest.hexdigest()
