"""Features from images with the DINO family of vision backbones.

Shape comments use these letters everywhere: B images, N tokens = 1 + R + P, R registers, P patches = h * w, H heads,
D head width, C embed_dim = H * D, T tokens of a packed batch, S sequences in it, G side of a learned position table,
h and w patches, H_px and W_px pixels.  Every coordinate that a user gives or gets is (x, y) in pixels of the original
picture; every size is (height, width).

Reading order: rope, packing, attention, layers, vit, facets, images, preprocess, features, sources, batching, bulk,
extract, zoo, keys, weights, backbone.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from .backbone import Backbone
    from .embed import EmbedReport
    from .errors import (
        CheckpointError,
        Dinov3Error,
        GatedModelError,
        ImageError,
        InputError,
        InputTypeError,
        LayerError,
        MissingFileError,
        ModelNotFoundError,
        OfflineError,
        PrecisionError,
        UnsupportedError,
    )
    from .features import Features, LayerFeatures
    from .images import load_image
    from .places import list_pictures
    from .preprocess import Preprocess
    from .rope import RopeAugmentation
    from .vit import BackboneOutput, LayerOutput, VisionTransformer, ViTConfig
    from .zoo import MODELS, ModelInfo, list_models

__all__ = [
    "MODELS",
    "Backbone",
    "BackboneOutput",
    "CheckpointError",
    "Dinov3Error",
    "EmbedReport",
    "Features",
    "GatedModelError",
    "ImageError",
    "InputError",
    "InputTypeError",
    "LayerError",
    "LayerFeatures",
    "LayerOutput",
    "MissingFileError",
    "ModelInfo",
    "ModelNotFoundError",
    "OfflineError",
    "PrecisionError",
    "Preprocess",
    "RopeAugmentation",
    "UnsupportedError",
    "ViTConfig",
    "VisionTransformer",
    "list_models",
    "list_pictures",
    "load_image",
]

# Imported at first use, so that importing the package costs nothing.
_HOMES = {
    "backbone": ("Backbone",),
    "embed": ("EmbedReport",),
    "errors": (
        "CheckpointError",
        "Dinov3Error",
        "GatedModelError",
        "ImageError",
        "InputError",
        "InputTypeError",
        "LayerError",
        "MissingFileError",
        "ModelNotFoundError",
        "OfflineError",
        "PrecisionError",
        "UnsupportedError",
    ),
    "features": ("Features", "LayerFeatures"),
    "images": ("load_image",),
    "places": ("list_pictures",),
    "preprocess": ("Preprocess",),
    "rope": ("RopeAugmentation",),
    "vit": ("BackboneOutput", "LayerOutput", "VisionTransformer", "ViTConfig"),
    "zoo": ("MODELS", "ModelInfo", "list_models"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
