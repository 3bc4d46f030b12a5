"""Entry points for torch.hub, with Meta's names and keywords; the models are called like Meta's."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .backbone import Backbone, ConvNeXtBackbone, ViTBackbone
from .errors import InputTypeError, UnsupportedError
from .model.convnext import ConvNeXtConfig
from .model.vit import ViTConfig
from .released.attach import load_head, random_head
from .released.catalogue import HEADS, find_head, variant_of
from .zoo import MODELS, ModelInfo, find

__all__ = ["HubBackbone", "entry_points"]

_DATASETS = {"LVD1689M": "", "LVD142M": "", "SAT493M": "_sat493m"}  # Meta's name of the weights -> suffix of our name
_OF_HEADS = ("NYU", "KITTI", "IMAGENET1K", "SYNTHMIX", "LVTD2300M")  # Meta's names for the weights of heads
# Entries of Meta's repositories that this package does not have; calling one raises an error that says so.
_HEADS = ("dinov3_vit7b16_de", "dinov3_vit7b16_ms")
_ELSEWHERE = (
    *("dinov3_vitl16plus", *_HEADS),
    *("dino_resnet50", *(f"dino_xcit_{kind}_p{patch}" for kind in ("small_12", "medium_24") for patch in (16, 8))),
)


class HubBackbone(Backbone):
    """A Backbone that is called like Meta's models; all other methods are those of `Backbone`."""

    networks: "ClassVar[dict[type, type[Backbone]]]" = {}
    forward_features: Callable[..., Any]
    if TYPE_CHECKING:

        def __call__(self, *args: Any, **options: Any) -> Any: ...

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Sequence[Tensor],  # [B, 3, H_px, W_px] normalised, or one such tensor per crop size
        masks: Any = None,  # [B, P] bool, or one per crop size
        is_training: bool = False,
        layers: int | Sequence[int] | None = None,
    ) -> Any:
        """The class token after the final norm, [B, C]; with `is_training` the result of `forward_features`.

        With `layers` it returns a `BackboneOutput`, which the methods of `Backbone` need.

        Raises: as `Backbone.__call__`.

        Source: dinov3/models/vision_transformer.py at 6876159.
        """
        if layers is not None:
            return super().forward(x, layers, masks)  # type: ignore[arg-type]
        found = self.forward_features(x, masks)
        if is_training:
            return found
        return [one["x_norm_clstoken"] for one in found] if isinstance(found, list) else found["x_norm_clstoken"]


class HubViT(HubBackbone, ViTBackbone):  # type: ignore[misc]  # forward returns another type
    pass


class HubConvNeXt(HubBackbone, ConvNeXtBackbone):  # type: ignore[misc]
    """`output_patch_size`: the grid of `get_intermediate_layers`, which Meta's code calls `patch_size`."""

    output_patch_size: int | None = None

    def get_intermediate_layers(  # type: ignore[override]
        self, x: Tensor, n: int | Sequence[int] = 1, *flags: bool, **named: Any
    ) -> Any:
        """As Meta's, for pixels `x` [B, 3, H_px, W_px]; the maps have the grid of `output_patch_size`."""
        return super().get_intermediate_layers(x, n, *flags, **{"patch_size": self.output_patch_size, **named})


HubBackbone.networks |= {ViTConfig: HubViT, ConvNeXtConfig: HubConvNeXt}


def entry_points() -> dict[str, Callable[..., Any]]:
    """A function for each model and each released head; those for Meta's other entries raise UnsupportedError."""
    heads = {info.name: _head_entry(info.name) for info in HEADS}
    models = {name: _entry(info) for name, info in MODELS.items()}
    return models | heads | {name: _refusal(name) for name in _ELSEWHERE}


def _head_entry(name: str) -> Callable[..., Any]:
    info = find_head(name)

    def called(head: Any) -> Any:  # DINOv3's entry gives the tokenizer, too
        return (head, head.tokenizer) if info.kind == "text" and info.options["is_v3"] else head

    def load(
        pretrained: bool = True,
        *,
        layers: int | None = None,
        weights: Any = None,
        backbone_weights: Any = None,
        bpe_path_or_url: Any = None,
        check_hash: bool = True,
        device: Any = "cpu",
    ) -> Any:
        weights = getattr(weights, "value", weights)  # an enum member in Meta's callers
        dataset = weights.upper() if isinstance(weights, str) and weights.upper() in _OF_HEADS else None
        variant = variant_of(name, dataset if dataset in ("NYU", "KITTI") else None, layers)
        if not pretrained:
            return called(random_head(name, variant))
        backbone = None
        backbone_weights = getattr(backbone_weights, "value", backbone_weights)
        if backbone_weights is not None and backbone_weights not in _DATASETS:
            backbone = Backbone.from_pretrained(info.backbone, weights=backbone_weights, device=device)
        head = load_head(name, backbone, weights=None if dataset else weights, variant=variant, device=device)
        return called(head)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = (
        f"{name} on its backbone, in eval mode on the CPU.  Licence of the weights: {info.licence}.\n\n"
        "weights: a path, a link, or the name of a data set if there are several.  layers: 4 or 1, if both are\n"
        "released.  backbone_weights: a path or a link.  pretrained=False gives random weights.  bpe_path_or_url and\n"
        "check_hash are accepted for Meta's callers: the package contains the merges of the tokenizer."
    )
    return load


def _entry(info: ModelInfo) -> Callable[..., HubBackbone]:
    def load(pretrained: bool = True, *, weights: Any = None, check_hash: bool = True, **options: Any) -> HubBackbone:
        name = info.name
        weights = getattr(weights, "value", weights)  # an enum member in Meta's callers
        if isinstance(weights, bool):
            pretrained, weights = weights, None
        if isinstance(weights, str) and weights in _DATASETS:
            name, weights = name.removesuffix("_sat493m") + _DATASETS[weights], None
        patch_size = options.pop("patch_size", None) if isinstance(info.config, ConvNeXtConfig) else None
        if pretrained:
            model = HubBackbone.from_pretrained(name, weights=weights, **{"device": "cpu", **options})
        elif options or weights is not None:
            given = ", ".join([*options, *(["weights"] if weights is not None else [])])
            raise InputTypeError(
                f"pretrained=False gives random weights and takes no other option, got {given}; leave them out"
            )
        else:
            model = HubBackbone.from_config(name)
        if isinstance(model, HubConvNeXt):
            model.output_patch_size = patch_size
        return model

    load.__name__ = load.__qualname__ = info.name
    load.__doc__ = (
        f"{info.name}, in eval mode on the CPU.  Licence of the weights: {info.licence}.\n\n"
        "weights: a path, a link, or True for those of the hub.  pretrained=False gives random weights.  check_hash\n"
        "has no effect, because downloads are always checked.  Other options are those of Backbone.from_pretrained."
    )
    return load


def _refusal(name: str) -> Callable[..., HubBackbone]:
    def refuse(*_: Any, **__: Any) -> HubBackbone:
        if name in _HEADS:
            backbone = "_".join(name.split("_")[:2])
            raise UnsupportedError(
                f"{name!r} is a head that this package does not have; load its backbone {backbone!r}"
            )
        find(name)  # raises an error with the reason
        raise UnsupportedError(f"this package does not have {name!r}; torch.hub.list() gives the names")

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = "This package does not have it: raises UnsupportedError with the reason."
    return refuse
