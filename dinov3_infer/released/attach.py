"""`load_head`: one call for every released head."""

import logging
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ..backbone import Backbone
from ..checkpoints.reading import Checkpoint, TensorsInMemory, open_checkpoint
from ..checkpoints.recognise import normalise
from ..errors import CheckpointError, GatedModelError
from ..hub.answers import HubOptions
from ..hub.download import download
from ..hub.locate import locate_file
from .catalogue import HeadInfo, find_head
from .depth import Depth
from .dinotxt import DinoTxt
from .head import Released, refuse_other_backbone
from .imagenet import Classifier
from .segments import Segments

__all__ = ["load_head", "random_head"]

log = logging.getLogger("dinov3_infer")

_Path: TypeAlias = str | os.PathLike[str]

_KINDS: dict[str, type[Released]] = {
    "classifier": Classifier, "depth": Depth, "segments": Segments, "text": DinoTxt,
}  # fmt: skip


def load_head(
    name: str,
    backbone: Backbone | None = None,
    *,
    weights: _Path | Sequence[_Path] | None = None,
    variant: Any = None,
    device: Any = "auto",
    cache_dir: _Path | None = None,
    local_files_only: bool = False,
) -> Any:
    """A released head by the name of its entry in Meta's repository, such as "dinov2_vits14_lc", on its backbone.

    `backbone`: the one it goes on, or None to load it too.  One of another shape is refused.
    `weights`: the head's file, or a folder or a link: Meta's file, or one of transformers that holds the backbone as
    well; a list of them where the owner has split a head.  None downloads what its owner has put up for everyone.
    `variant`: where one name has several: of `_lc` the number of layers, 4 or 1; of `_dd` "NYU" or
    "KITTI"; of `_ld` both, as ("NYU", 4).

    Raises: ModelNotFoundError, InputError for another backbone, GatedModelError where the file has to be asked for,
    CheckpointError for another file.
    """
    info = find_head(name, variant)
    if backbone is not None:
        refuse_other_backbone(info, backbone)
    checkpoint = _opened(info, weights, HubOptions(cache_dir=cache_dir, local_files_only=local_files_only))
    if backbone is None:
        inside = normalise(checkpoint.tensors.shapes)  # a model of transformers has its backbone with it
        given = checkpoint.path if inside else None
        options = dict(cache_dir=cache_dir, local_files_only=local_files_only)
        backbone = Backbone.from_pretrained(info.backbone, weights=given, device=device, **options)  # type: ignore[arg-type]
    return _KINDS[info.kind].made_for(info, backbone, checkpoint).read(checkpoint)


def random_head(name: str, variant: Any = None) -> Released:
    """The same with random weights, the backbone's too, for tests and for whoever loads a state_dict of their own."""
    info = find_head(name, variant)
    return _KINDS[info.kind](info, Backbone.from_config(info.backbone)).eval()


def _opened(info: HeadInfo, weights: _Path | Sequence[_Path] | None, options: HubOptions) -> Checkpoint:
    if weights is not None:
        each = [weights] if isinstance(weights, (str, os.PathLike)) else list(weights)
        return _joined([open_checkpoint(locate_file(one, options)) for one in each])
    if not info.links:
        raise GatedModelError(
            f"the weights of {info.name} are sent by their owner to whoever accepts the licence ({info.licence}); "
            f"ask for '{info.file}', and give it with weights="
        )
    return _joined([_downloaded(info, link, options) for link in info.links])


def _downloaded(info: HeadInfo, link: str, options: HubOptions) -> Checkpoint:
    def check(path: Any) -> None:
        if not _KINDS[info.kind].names_in(open_checkpoint(path))[0]:
            raise CheckpointError(f"'{link}' is not the head {info.name}; give another link")

    path, is_new = download(link, cache_dir=options.cache_dir, not_asked=options.not_asked, check=check)
    if is_new:
        log.warning("%s: downloaded from '%s'; the licence of these weights: %s", info.name, link, info.licence)
    return open_checkpoint(path)


def _joined(parts: Sequence[Checkpoint]) -> Checkpoint:
    """The files of one head as one; their tensors stay mapped."""
    if len(parts) == 1:
        return parts[0]
    found: dict[str, Tensor] = {}
    for part in parts:
        if twice := found.keys() & part.tensors.shapes.keys():
            raise CheckpointError(f"'{part.path}' holds {min(twice)} once more; give each file of the head once")
        found |= {name: part.tensors.read(name) for name in part.tensors.shapes}
    return Checkpoint("' and '".join(part.path for part in parts), TensorsInMemory(found))
