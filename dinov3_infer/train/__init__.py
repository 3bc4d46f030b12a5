"""The trainer: self-supervised learning with the objectives of DINO, DINOv2 and DINOv3, and distillation.

    python -m dinov3_infer.train --data FOLDER --model vits16 --out RUN

Reading order: losses, method, loop; then config, views, batches, pictures; blocks for the speed.
"""

from ..errors import DiskError
from .config import PRESETS, TrainConfig
from .health import TrainingStopped
from .loop import train
from .pictures import Data, open_data

__all__ = ["PRESETS", "Data", "DiskError", "TrainConfig", "TrainingStopped", "open_data", "train"]
