"""The trainer: self-supervised learning with the objectives of DINO, DINOv2 and DINOv3, and distillation.

    python -m dinov3_infer.train --data FOLDER --model vits16 --out RUN

Reading order: losses, method, loop; then config, views, batches, images; blocks for the speed.
"""

from ..errors import DiskError
from .config import PRESETS, TrainConfig
from .datasets import Data, open_data
from .health import TrainingStopped
from .loop import train

__all__ = ["PRESETS", "Data", "DiskError", "TrainConfig", "TrainingStopped", "open_data", "train"]
