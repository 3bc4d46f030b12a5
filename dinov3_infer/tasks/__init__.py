"""Tasks on features that a backbone has computed: classifiers, segmentation, search, clusters, and images to look at.

Probes take class names or whole numbers.  Masks hold whole numbers: 0 is the background, 255 is ignored.  A fitted
object has `fit`, `predict`, `save` and `load`, and works with the weights of one backbone only.
"""

from .attentive import AttentiveProbe
from .classifier import Probe
from .clusters import Hierarchy, hierarchy, retrieve
from .dense import dense_features
from .explore import explore
from .legend import depth_picture, segments_picture
from .neighbours import Duplicates, duplicates, search
from .overlay import at_pixels, attention_picture, overlay, panel, sheet
from .pca import foreground, pca_picture, pca_rgb
from .probes import KNN, LinearProbe, LogisticProbe, nearest
from .pyramid import Pyramid
from .segmentation import OneShotSegmenter, SegmentationHead
from .similarity import patch_weights, region_vector, similarity_map, similarity_picture

__all__ = [
    "KNN",
    "AttentiveProbe",
    "Duplicates",
    "Hierarchy",
    "LinearProbe",
    "LogisticProbe",
    "OneShotSegmenter",
    "Probe",
    "Pyramid",
    "SegmentationHead",
    "at_pixels",
    "attention_picture",
    "dense_features",
    "depth_picture",
    "duplicates",
    "explore",
    "foreground",
    "hierarchy",
    "nearest",
    "overlay",
    "panel",
    "patch_weights",
    "pca_picture",
    "pca_rgb",
    "region_vector",
    "retrieve",
    "search",
    "segments_picture",
    "sheet",
    "similarity_map",
    "similarity_picture",
]
