"""Every released head that can be named: what it is, the backbone it was trained on, where its weights are.

Names are those of Meta's entries for torch.hub where there is one, else those of its files.

Sources: dinov3 at 6876159, dinov2 at b8931f7, and dino, each of facebookresearch.
"""

import difflib
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from ..errors import InputError, ModelNotFoundError, UnsupportedError
from ..images.preprocess import Preprocess
from ..zoo import MODELS

__all__ = ["HEADS", "HeadInfo", "find_head", "transform_for", "variant_of"]

Kind = Literal["classifier", "depth", "segments", "text"]


@dataclass(frozen=True)
class HeadInfo:
    """One released head."""

    name: str
    kind: Kind
    backbone: str  # the row of the zoo that it was trained on
    licence: str  # of its weights
    file: str  # the owner's
    folder: str | None = None  # of the owner's server, where the file is open to everyone
    variant: Any = None  # where one name has several: number of layers, or data set
    # what its module is built with, and as what transformers has it
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    more: tuple[str, ...] = ()  # other files of the owner that hold a part of it

    @property
    def link(self) -> str | None:
        """Where anyone can download the file."""
        return next(iter(self.links), None)

    @property
    def links(self) -> tuple[str, ...]:
        """Of all its files; none where they have to be asked for."""
        names = () if self.folder is None else (self.file, *self.more)
        return tuple(f"https://dl.fbaipublicfiles.com/{self.folder}/{name}" for name in names)


_APACHE, _DINOV3 = "Apache-2.0", "DINOv3 License"


def _classifiers() -> list[HeadInfo]:
    rows = []
    for size in "sblg":
        for ending, part in (("", ""), ("_reg", "_reg4")):
            for layers, number in ((4, "4"), (1, "")):
                name = f"dinov2_vit{size}14"
                has_class = {} if layers == 4 else dict(transformers="classifier")
                rows.append(
                    HeadInfo(
                        f"{name}{ending}_lc", "classifier", f"{name}{ending}", _APACHE,
                        f"{name}{part}_linear{number}_head.pth", f"dinov2/{name}", layers,
                        dict(vector="cls4_mean" if layers == 4 else "cls_mean", **has_class),
                    )
                )  # fmt: skip
    rows.append(
        HeadInfo(
            "dinov3_vit7b16_lc", "classifier", "dinov3_vit7b16", _DINOV3,
            "dinov3_vit7b16_imagenet1k_linear_head-90d8ed92.pth",
            options=dict(vector="cls_mean", transform=dict(size=512, fit="crop", filter="bicubic", engine="pil")),
        )
    )  # fmt: skip
    for size, owner, vector in (("s", "deitsmall", "cls4"), ("b", "vitbase", "interleaved")):
        for patch in (16, 8):
            name, theirs = f"dino_vit{size}{patch}", f"dino_{owner}{patch}"
            rows.append(
                HeadInfo(
                    f"{name}_lc", "classifier", name, _APACHE, f"{theirs}_linearweights.pth",
                    f"dino/{theirs}_pretrain", options=dict(vector=vector),
                )
            )  # fmt: skip
    return rows


_WIDTHS = dict(s=384, b=768, l=1024, g=1536)
_FOUR = dict(s=(2, 5, 8, 11), b=(2, 5, 8, 11), l=(4, 11, 17, 23), g=(9, 19, 29, 39))  # blocks
_LAST = dict(s=11, b=11, l=23, g=39)
_OWN_SIZE: dict[str, Any] = dict(patch_size=1, size=None, fit="native")  # filled up to whole patches by the head


def _depths() -> list[HeadInfo]:
    rows = []
    for (size, width), (dataset, most) in product(_WIDTHS.items(), (("NYU", 10.0), ("KITTI", 80.0))):
        name = f"dinov2_vit{size}14"
        common: dict[str, Any] = dict(
            normed=False, floor=0.001, range=(0.001, most), stretched=True, transform=_OWN_SIZE
        )  # fmt: skip
        dpt = dict(
            channels=(width // 8, width // 4, width // 2, width), inner=256, hidden=32, readout=True, norm=False,
            unit_bias=False, project=True,
        )  # fmt: skip
        rows.append(
            HeadInfo(
                f"{name}_dd", "depth", name, _APACHE, f"{name}_{dataset.lower()}_dpt_head.pth", f"dinov2/{name}",
                dataset, common | dict(dpt=dpt, blocks=_FOUR[size], transformers="dpt"),
            )
        )  # fmt: skip
        for layers, number in ((4, "4"), (1, "")):
            # Meta's entries take bins up to 80 m for NYU too, so that their depths are eight times too large
            bins = dict(outputs=256, bins="linear", floor=0.1, owner_most=80.0)
            rows.append(
                HeadInfo(
                    f"{name}_ld", "depth", name, _APACHE, f"{name}_{dataset.lower()}_linear{number}_head.pth",
                    f"dinov2/{name}", (dataset, layers),
                    common | bins | dict(blocks=_FOUR[size] if layers == 4 else (_LAST[size],)),
                )
            )  # fmt: skip
    rows.sort(key=lambda row: row.name.endswith("_ld"))  # those of DPT first
    synthmix = dict(
        channels=(2048,) * 4, inner=512, hidden=32, readout=False, norm=True, unit_bias=False, project=True
    )  # fmt: skip
    canopy = dict(
        channels=(128, 256, 512, 1024), inner=256, hidden=128, readout=True, norm=False, unit_bias=True, project=False
    )  # fmt: skip
    rows.append(
        HeadInfo(
            "dinov3_vit7b16_dd", "depth", "dinov3_vit7b16", _DINOV3, "dinov3_vit7b16_synthmix_dpt_head-02040be1.pth",
            options=dict(
                dpt=synthmix, blocks=_FOUR["g"], normed=True, outputs=256, bins="linear", floor=0.1,
                range=(0.001, 100.0), transform=dict(size=(768, 1024)),
            ),
        )
    )  # fmt: skip
    mean, std = (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)  # of red not that of the backbone
    rows.append(
        HeadInfo(
            "dinov3_vitl16_chmv2", "depth", "dinov3_vitl16_sat493m", _DINOV3,
            "dinov3_vitl16_chmv2_dpt_head-3703d643.pth",
            options=dict(
                dpt=canopy, blocks=(5, 11, 17, 23), normed=True, outputs=256, bins="mixlog", floor=1e-8,
                range=(0.001, 96.0), transform=_OWN_SIZE | dict(mean=mean, std=std), transformers="chmv2",
            ),
        )
    )  # fmt: skip
    return rows


def _segments() -> list[HeadInfo]:
    """Meta has no entries for these; the names are those of the files, without "_head"."""
    rows = []
    for size, dataset, (ending, layers) in product(_WIDTHS, ("ade20k", "voc2012"), (("linear", 1), ("ms", 4))):
        backbone = f"dinov2_vit{size}14"
        name = f"{backbone}_{dataset}_{ending}"
        options = dict(classes=dataset, layers=layers, transform=_OWN_SIZE)
        rows.append(
            HeadInfo(name, "segments", backbone, _APACHE, f"{name}_head.pth", f"dinov2/{backbone}", options=options)
        )
    return rows


def _texts() -> list[HeadInfo]:
    v3, v2 = "dinov3_vitl16_dinotxt", "dinov2_vitl14_reg4_dinotxt"
    size = "tet1280d20h24l"  # text transformer of width 1280, 20 heads, 24 layers
    common: dict[str, Any] = dict(text=dict(width=1280, heads=20, depth=24))
    crop = dict(size=512, fit="crop", filter="bicubic", engine="pil")
    return [
        HeadInfo(
            f"{v3}_{size}", "text", "dinov3_vitl16", _DINOV3, f"{v3}_vision_head_and_text_encoder-a442d8f5.pth",
            options=common | dict(is_v3=True, transform=crop),
        ),
        HeadInfo(
            f"{v2}_{size}", "text", "dinov2_vitl14_reg", _APACHE, f"{v2}_{size}_vision_head.pth",
            "dinov2/dinov2_vitl14", more=(f"{v2}_{size}_text_encoder.pth",), options=common | dict(is_v3=False),
        ),
    ]  # fmt: skip


HEADS: tuple[HeadInfo, ...] = (*_classifiers(), *_depths(), *_segments(), *_texts())


_LEFT_OUT = {
    "dinov3_vit7b16_de": "a detector for the 7B backbone alone, which no installable library can confirm",
    "dinov3_vit7b16_ms": "an adapter and Mask2Former of 927 million parameters for the 7B backbone alone",
    "dinov2_vitg14_ade20k_m2f": "a whole model of mmsegmentation 0.x, with another backbone inside",
}


def find_head(name: str, variant: Any = None) -> HeadInfo:
    """The row of a head; of several under one name that of `variant`, else the first.

    Raises: ModelNotFoundError with the closest names, InputError for a variant that was not released,
    UnsupportedError for a released head that is left out.
    """
    if (reason := _LEFT_OUT.get(str(name))) is not None:
        raise UnsupportedError(f"{name} is not here: {reason}; train a head of dinov3_infer.tasks on a backbone")
    rows = [row for row in HEADS if row.name == name]
    if not rows:
        close = difflib.get_close_matches(str(name).lower(), sorted({row.name for row in HEADS}), n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?" if close else "see dinov3_infer.released.catalogue.HEADS"
        )
        raise ModelNotFoundError(f"unknown head {name!r}: {hint}")
    found = next((row for row in rows if variant in (None, row.variant)), None)
    if found is None:
        known = " or ".join(repr(row.variant) for row in rows if row.variant is not None) or "one kind only"
        raise InputError(f"{name} was released for {known}, not for {variant!r}")
    return found


def variant_of(name: str, dataset: str | None = None, layers: int | None = None) -> Any:
    """What `find_head` takes for a data set ("NYU", "KITTI") and a number of layers, where one or both are asked for.

    Raises: ModelNotFoundError.
    """
    usual = find_head(name).variant
    if isinstance(usual, tuple):
        return (dataset or usual[0], layers or usual[1])
    given = [one for one in (dataset, layers) if one is not None]
    return usual if not given else given[0] if len(given) == 1 else tuple(given)


def transform_for(info: HeadInfo) -> Preprocess:
    """How images were prepared for a head: as its row says, else as Meta evaluates its backbone."""
    row = MODELS[info.backbone]
    options: dict[str, Any] = dict(size=224, fit="crop", resize_to=256, filter="bicubic", engine="pil")
    common = dict(mean=row.mean, std=row.std, patch_size=row.config.patch_size)
    return Preprocess(**(common | info.options.get("transform", options)))
