"""A released head on its backbone: read strictly, refused on another one, saved with the fingerprint of its own."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backbone import Backbone, Images
from ..checkpoints.architecture import looks_like, same_architecture
from ..checkpoints.reading import Checkpoint
from ..checkpoints.recognise import some
from ..errors import CheckpointError, InputError, UnsupportedError
from ..images.opening import each_image
from ..images.preprocess import PixelBatch
from ..system import whole
from ..zoo import MODELS
from .as_transformers import FORMS, save_as_transformers
from .catalogue import HeadInfo, transform_for

__all__ = ["Released", "refuse_other_backbone", "shape_of", "to_whole_patches"]

_WRAPPERS = re.compile(r"^(?:(?:state_dict|module|model)\.)+")
_OF_TRAINING = (r"(?:optimizer|scheduler|meta)\..*", "")
_KEY = "dinov3_infer"  # of our entry in the metadata of a file


class Released(nn.Module):
    """Base of the heads: a module of normalised pixels with the backbone inside, whose call is the owner's.

    Parameters of the head itself have Meta's names.
    """

    # (pattern of a name in a file, our name; "" for what belongs to the backbone or to training), the first counts
    rules: ClassVar[tuple[tuple[str, str], ...]]
    names: tuple[str, ...] = ()  # of classes

    def __init__(self, info: HeadInfo, backbone: Backbone) -> None:
        super().__init__()
        refuse_other_backbone(info, backbone)
        self.info, self.backbone, self.preprocess = info, backbone, transform_for(info)

    @classmethod
    def made_for(cls, info: HeadInfo, backbone: Backbone, checkpoint: Checkpoint) -> Self:
        """Of the sizes that a file shows."""
        return cls(info, backbone)

    @classmethod
    def names_in(cls, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
        """(our name -> name in the file) of what is the head's, and names that nothing explains."""
        found: dict[str, str] = {}
        strange: list[str] = []
        for name in checkpoint.tensors.shapes:
            bare = _WRAPPERS.sub("", name)
            rule = next(((p, ours) for p, ours in (*cls.rules, _OF_TRAINING) if re.fullmatch(p, bare)), None)
            if rule is None:
                strange.append(name)
            elif ours := re.sub(*rule, bare):
                found[ours] = name
        return found, strange

    def head_state(self) -> dict[str, Tensor]:
        """Parameters and buffers without the backbone's."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("backbone.")}

    def read(self, checkpoint: Checkpoint) -> Self:
        """Takes the weights from a file.

        Raises: CheckpointError for tensors that are missing, left over or misshapen, and for weights that were saved
        with another backbone.
        """
        self._refuse_other_weights(checkpoint)
        names, strange = self.names_in(checkpoint)
        shapes, wanted = checkpoint.tensors.shapes, self.head_state()
        faults = {
            "missing": [n for n in wanted if n not in names and not n.endswith("num_batches_tracked")],
            "left over": strange + [theirs for ours, theirs in names.items() if ours not in wanted],
            "of another shape": [
                f"{names[n]} {list(shapes[names[n]])} for {list(t.shape)}"
                for n, t in wanted.items()
                if n in names and shapes[names[n]] != tuple(t.shape)
            ],
        }
        if any(faults.values()):
            counts = "; ".join(f"{len(found)} {what}: {some(found, 3)}" for what, found in faults.items() if found)
            raise CheckpointError(f"'{checkpoint.path}' does not fit {self.info.name}: {counts}; {self._hint()}")
        with torch.no_grad():
            for ours, tensor in wanted.items():
                if ours in names:
                    tensor.copy_(checkpoint.tensors.read(names[ours]))
        broken = next((n for n, t in wanted.items() if t.is_floating_point() and not t.isfinite().all()), None)
        if broken is not None:
            raise CheckpointError(f"'{checkpoint.path}' holds NaN or infinity in {names[broken]}; download it again")
        return self.eval()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the head as one safetensors file under Meta's names, with the fingerprint of its backbone."""
        target = Path(path).expanduser()
        if target.suffix != ".safetensors":
            raise InputError(f"a head is one .safetensors file; '{target}' should end in that")
        stored = json.dumps(self._facts())
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head_state().items()}
        with whole(target) as beside:
            save_file(tensors, beside, {"format": "pt", _KEY: stored})
        return target

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes backbone and head as one folder that transformers loads, and `load_head` with weights=.

        Raises: UnsupportedError for a head that transformers has no class for, InputError for a target that is a file.
        """
        options = self.info.options
        if "transformers" not in options:
            raise UnsupportedError(
                f"transformers has no class for this {self.info.name}; save() writes it under Meta's names"
            )
        make = FORMS[options["transformers"]]
        form = make(self.backbone, self.head_state(), options, self.preprocess, self.names)
        return save_as_transformers(form, self.backbone, self._facts(), folder)

    def _facts(self) -> dict[str, str]:
        return dict(head=self.info.name, backbone=self.backbone.fingerprint())

    def _hint(self) -> str:
        names = (self.info.file, *self.info.more)
        return f"give its files as a list: {', '.join(names)}" if self.info.more else "is it that head's file?"

    def _refuse_other_weights(self, checkpoint: Checkpoint) -> None:
        stored = getattr(checkpoint.tensors, "metadata", "")
        try:
            made_with = json.loads(stored).get("backbone") if stored else None
        except (ValueError, AttributeError):
            raise CheckpointError(
                f"'{checkpoint.path}' was not written by save(), or is damaged; save it again"
            ) from None
        if made_with is not None and made_with != self.backbone.fingerprint():
            raise CheckpointError(
                f"'{checkpoint.path}' goes with other weights of its backbone ({str(made_with)[:12]}); load those"
            )

    def pixels(self, images: Images, size: Any = None) -> PixelBatch:
        """Images as the head takes them, on the device of the backbone."""
        batch = self.preprocess.with_options(size).batch(each_image(images))
        return PixelBatch(batch.pixels.to(self.backbone.device), batch.placements, batch.valid)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()  # frozen, as everyone of these heads was trained
        return self


def refuse_other_backbone(info: HeadInfo, backbone: Backbone) -> None:
    """Raises InputError for a backbone that a head was not made for."""
    row = MODELS[info.backbone]
    if not isinstance(backbone, Backbone):
        raise InputError(f"backbone is a Backbone, got {type(backbone).__name__}; load {info.backbone!r}")
    if not same_architecture(row.config, backbone.config):
        raise InputError(
            f"{info.name} goes on {info.backbone}, and this backbone {looks_like(vars(backbone.config))}; load that one"
        )
    known = backbone.info
    if known is not None and known.name != row.name and known.architecture != row.architecture:
        raise UnsupportedError(f"{info.name} was trained on {row.name}, and these weights are {known.name}'s")


def shape_of(checkpoint: Checkpoint, names: Mapping[str, str], ours: str) -> Sequence[int] | None:
    """Of one of our tensors in a file, None where it is not there."""
    return checkpoint.tensors.shapes.get(names.get(ours, ""))


def to_whole_patches(pixels: Tensor, patch: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """[B, 3, H_px, W_px] with zeros around up to whole patches, and how many: (left, right, top, bottom).

    Half of them are on either side, as the owners have it.
    """
    down, across = (-side % patch for side in pixels.shape[2:])
    padding = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(pixels, padding), padding
