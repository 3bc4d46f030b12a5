"""Image features from the DINO family of vision backbones.

Shapes use these letters everywhere: B images, N tokens = 1 + R + P, R registers, P patches = h * w, H heads, D head
width, C embed_dim = H * D, T tokens of a packed batch, S sequences in it, G side of a learned position table, h and w
patches, H_px and W_px pixels.  Every coordinate that a user gives or gets is (x, y) in pixels of the original image;
every size is (height, width).

Example:
    >>> from dinov3_infer import Backbone
    >>> features = Backbone.from_pretrained("vits16").extract_features("photo.jpg")
    >>> features.embedding  # [1, C]
"""

from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .backbone import Backbone as Backbone
    from .errors import (
        CheckpointError as CheckpointError,
        Dinov3Error as Dinov3Error,
        DiskError as DiskError,
        GatedModelError as GatedModelError,
        ImageError as ImageError,
        InputError as InputError,
        InputTypeError as InputTypeError,
        LayerError as LayerError,
        MissingFileError as MissingFileError,
        ModelNotFoundError as ModelNotFoundError,
        OfflineError as OfflineError,
        PrecisionError as PrecisionError,
        UnsupportedError as UnsupportedError,
    )
    from .features.disk.store import Store as Store
    from .features.result import EmbedReport as EmbedReport, Features as Features, LayerFeatures as LayerFeatures
    from .images.decode import ImageLike as ImageLike, load_image as load_image
    from .images.paths import list_images as list_images
    from .images.preprocess import Fit as Fit, Preprocess as Preprocess
    from .model.convnext import ConvNeXt as ConvNeXt, ConvNeXtConfig as ConvNeXtConfig
    from .model.network import BackboneOutput as BackboneOutput, LayerOutput as LayerOutput
    from .model.rope import RopeAugmentation as RopeAugmentation
    from .model.vit import VisionTransformer as VisionTransformer, ViTConfig as ViTConfig
    from .released.attach import load_head as load_head
    from .zoo import MODELS as MODELS, ModelInfo as ModelInfo, list_models as list_models

# Imported on first use, so that importing the package is fast.
_HOMES = {
    "backbone": "Backbone",
    "errors": (
        "CheckpointError Dinov3Error DiskError GatedModelError ImageError InputError InputTypeError LayerError "
        "MissingFileError ModelNotFoundError OfflineError PrecisionError UnsupportedError"
    ),
    "features.disk.store": "Store",
    "features.result": "EmbedReport Features LayerFeatures",
    "images.decode": "ImageLike load_image",
    "images.paths": "list_images",
    "images.preprocess": "Fit Preprocess",
    "model.convnext": "ConvNeXt ConvNeXtConfig",
    "model.rope": "RopeAugmentation",
    "model.network": "BackboneOutput LayerOutput",
    "model.vit": "VisionTransformer ViTConfig",
    "released.attach": "load_head",
    "zoo": "MODELS ModelInfo list_models",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
