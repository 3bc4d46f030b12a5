"""The trainer: self-supervised learning with the objectives of DINO, DINOv2 and DINOv3, and distillation.

    dinov3-infer train --data FOLDER --model vits16 --out RUN
    torchrun --nproc-per-node 8 -m dinov3_infer.train --data FOLDER --model vits16 --out RUN

Reading order: losses, method, loop; then config, views, datasets, batches; blocks for the speed on a CPU.
"""

from ..errors import DiskError
from .config import PRESETS, TrainConfig
from .datasets import Data, open_data
from .health import TrainingStopped
from .loop import train

__all__ = ["PRESETS", "Data", "DiskError", "TrainConfig", "TrainingStopped", "open_data", "train"]
