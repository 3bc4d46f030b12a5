"""Loads the tensors of a checkpoint into a model; missing and unexpected tensors are errors in every layout.

The model's own list of tensors drives the reading, so that a missing tensor is always found.  Any tensor that is left
over in the file, and that the layout does not list as unused, is an error too.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..model.network import Network
from ..model.rope import rope_periods
from ..zoo import Config
from .architecture import looks_like
from .describe import Description
from .layouts import Parts
from .recognise import Stored, some

__all__ = ["Periods", "load_model"]

Periods = Literal["exact", "bfloat16"]
M = TypeVar("M", bound=Network)


def load_model(
    make: Callable[[Config], M],
    found: Description,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    periods: Periods | None = None,
    keep: bool = False,
) -> M:
    """Build the model that a checkpoint holds, in eval mode.

    Args:
        make: Builds the network from its config.
        found: The description of the checkpoint.
        dtype: Dtype of the linear layers and the patch convolution (None: float32); everything else is float32.
        device: Device of the model.
        periods: RoPE periods, "exact" or rounded to "bfloat16" (default: as stored, else exact).
        keep: Use the tensors as they are, with their dtype and device.

    Raises:
        CheckpointError: Tensors are missing, left over, of a wrong shape or not finite where that matters.
    """
    stored = found.stored
    with torch.device("meta"):
        model = make(found.config)
    needed = _account(model, found)
    device = _tensor(stored, next(iter(stored.names))).device if keep else torch.device(device)
    _fill(model, stored, needed, None if keep else (dtype or torch.float32), device)
    _settle_periods(model, found, periods, device)
    return model.eval()


def _account(model: Network, found: Description) -> dict[str, Parts]:
    """The place of each tensor of the model in the file.

    Raises: CheckpointError for tensors that are missing, left over or of a wrong shape.
    """
    stored = found.stored
    in_any_block = {_any_block(name) for name in stored.shapes}
    targets = model.state_dict()
    needed = {ours: stored.parts[ours] for ours in targets if ours in stored.parts}
    faults: dict[str, list[str]] = defaultdict(list)
    known = {*needed, "rope_periods"}  # periods can be computed; a set, since a file may claim a thousand blocks
    faults["missing"] = [ours for ours in targets if ours not in known]
    for ours, parts in needed.items():
        absent = [
            name
            for name in parts.names
            if name not in stored.shapes
            and (name not in parts.optional or (parts.form != "twice" and _any_block(name) in in_any_block))
        ]
        faults["missing"].extend(absent)
        if absent:
            continue
        kinds = {name: stored.dtypes[name] for name in parts.names if name in stored.shapes}
        faults["not stored as floating point numbers"].extend(name for name, kind in kinds.items() if kind is None)
        if _shape(parts, stored) != targets[ours].shape:
            first = parts.names[0]
            faults["of another shape"].append(
                f"{first} {list(stored.shapes[first])} for our {ours} {list(targets[ours].shape)}"
            )
    used = {name for parts in needed.values() for name in parts.names}
    unused = "|".join(stored.layout.unused) or r"(?!)"
    faults["left over"] = [
        name
        for name, shape in stored.shapes.items()
        if name not in used and 0 not in shape and not re.fullmatch(unused, name)
    ]
    if any(faults.values()):
        counts = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in faults.items() if names)
        raise CheckpointError(
            f"'{found.path}' does not fit (layout {stored.layout.label}, {looks_like(vars(found.config))}): {counts}"
        )
    return needed


def _any_block(name: str) -> str:
    """The name with "#" for its block number: all blocks have the same tensors."""
    return re.sub(r"\.\d+\.", ".#.", name, count=1)


def _shape(parts: Parts, stored: Stored) -> tuple[int, ...]:
    """The shape that the parts in the file give; () if they do not fit each other."""
    first = stored.shapes[parts.names[0]]
    shapes = [stored.shapes.get(name) for name in parts.names]
    if parts.form == "joined":
        if not all(shape is None or (shape and shape[1:] == first[1:]) for shape in shapes):
            return ()
        return (sum((shape or first)[0] for shape in shapes), *first[1:])
    if parts.form == "masked" and shapes[1] not in (None, first):
        return ()
    if parts.form == "folded":
        return (first[0], first[1] + 1, *first[2:]) if len(first) > 1 else ()
    if parts.form in ("cut", "placed"):
        other = stored.shapes.get(parts.names[1], ())
        if len(first) != 3 or len(other) != 3 or other[2] != first[2]:
            return ()
        return (first[0], first[1] - other[1], first[2]) if parts.form == "cut" else first
    return first[1:] if parts.form == "nested" and first[:1] == (1,) else first


@torch.no_grad()
def _fill(
    model: Network,
    stored: Stored,
    needed: Mapping[str, Parts],
    dtype: torch.dtype | None,  # None: as stored
    device: torch.device,
) -> None:
    """Read the tensors that `_account` found into the model."""
    matrices = _matrix_names(model)
    parameters = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for ours, parts in needed.items():
        want = dtype if dtype is None or ours in matrices else torch.promote_types(dtype, torch.float32)
        want = want or stored.dtypes[parts.names[0]] or torch.float32
        tensor = _read(parts, stored, torch.float32 if ours == "rope_periods" else want, device)
        if ours in parameters:
            if dtype is None:  # frozen parameters stay frozen; assigning would unfreeze them
                parameters[ours].requires_grad_(
                    any(_tensor(stored, name).requires_grad for name in parts.names if name in stored.shapes)
                )
            if not isinstance(tensor, nn.Parameter):  # a live module's own parameter is shared
                tensor = nn.Parameter(tensor, requires_grad=parameters[ours].requires_grad)
        state[ours] = tensor
    result = model.load_state_dict(state, strict=False, assign=True)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"rope_periods"}


def _matrix_names(model: Network) -> set[str]:
    """Parameters of matrix products, the only ones that take a lower precision."""
    return {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for kind in ("weight", "bias")
    }


def _read(parts: Parts, stored: Stored, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Read one of our tensors from its parts."""
    names = parts.names
    if parts.form == "joined":
        first = stored.shapes[names[0]]
        lengths = [stored.shapes.get(name, first)[0] for name in names]
        joined = torch.zeros(sum(lengths), *first[1:], dtype=dtype, device=device)
        for target, name in zip(joined.split(lengths), names, strict=True):
            if name in stored.shapes:
                target.copy_(_tensor(stored, name, copying=True))
        return joined
    tensor = _tensor(stored, names[0])
    if parts.form == "masked" and names[1] in stored.shapes:
        mask = _tensor(stored, names[1])
        if not mask.isfinite().all():
            raise CheckpointError(f"'{names[1]}' holds NaN: the model was saved before init_weights ran; save it again")
        tensor = tensor * mask.to(tensor.dtype)
    elif parts.form == "nested":
        tensor = tensor.squeeze(0)
    elif parts.form == "cut":
        registers = stored.shapes[names[1]][1]
        tensor = torch.cat((tensor[:, :1], tensor[:, 1 + registers :]), dim=1)
    elif parts.form == "placed":
        tensor = tensor + _tensor(stored, names[1])[:, 1 : 1 + tensor.shape[1]]
    elif parts.form == "folded":
        tensor = torch.cat((torch.zeros_like(tensor[:, :1]), tensor), dim=1)
    return tensor.to(device, dtype)


def _tensor(stored: Stored, name: str, *, copying: bool = False) -> Tensor:
    return stored.tensors.read(stored.names[name], copying=copying)


def _settle_periods(model: Network, found: Description, periods: Periods | None, device: torch.device) -> None:
    """Set the RoPE periods: as requested, else as stored in the file or in our block of config.json, else exact."""
    if model.rope_periods is None:
        return
    stated = found.rope_periods
    exact = rope_periods(model.config.head_dim, model.config.rope_base)
    if periods is not None:
        model.rope_periods = (exact.bfloat16().float() if periods == "bfloat16" else exact).to(device)
    elif isinstance(stated, list) and len(stated) == len(exact) and all(isinstance(v, float) for v in stated):
        model.rope_periods = torch.tensor(stated, dtype=torch.float32, device=device)
    elif model.rope_periods.is_meta:
        model.rope_periods = exact.to(device)
    if not model.rope_periods.is_meta and not ((model.rope_periods > 0) & model.rope_periods.isfinite()).all():
        raise CheckpointError(f"'{found.path}' holds RoPE periods that are not positive and finite; download it again")
