"""Entry points of torch.hub, under Meta's names, for all models of the package.

Example:
    >>> model = torch.hub.load("PATH OF THIS FOLDER", "dinov3_vitb16", source="local", weights="FILE OR LINK")
    >>> model(pixels)  # the class token, [B, C]

See dinov3_infer/torchhub.py.
"""

import sys as _sys
from pathlib import Path as _Path

import dinov3_infer as _package
from dinov3_infer.torchhub import entry_points as _entry_points

dependencies = ["torch", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm"]

# torch.hub removes its path from sys.path after loading, before the first image needs the kernels.  So import them
# now, from beside the package that was imported.  An installed package finds them without help.
_kernels = str(_Path(_package.__file__).resolve().parent.parent / "kernels")
if _Path(_kernels, "dinov3_infer_kernels").is_dir():
    _sys.path.insert(0, _kernels)
    import dinov3_infer_kernels as _bound  # noqa: F401

    _sys.path.remove(_kernels)

globals().update(_entry_points())
