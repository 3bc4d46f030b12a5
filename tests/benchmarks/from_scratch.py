"""Trains from random weights on CIFAR-10: our trainer against lightly's DINO, with equal ViT, images and steps.

    pip install lightly torchvision
    python tests/benchmarks/from_scratch.py OUT [--steps 4500] [--only ours lightly]    # needs npm

20-NN of the class tokens of the 50,000 training images for the 10,000 test images, beside those of the same ViT with
random weights and of raw pixels; "centred" subtracts the mean of the training images first.  Each number is [value,
lower end, upper end] of a 95 % interval.  lightly's side follows its DINO example: its transform, head and loss, with
our optimiser and our schedules of learning rate and momentum, since its momentum is meant for longer runs.  The record
is written to records/from_scratch.json, our curves beside it.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import conftest  # noqa: F401  (lets a CUDA build of torchvision be imported beside a CPU build of torch)
import numpy as np
import torch
from cifar10 import Pictures, cifar10, knn, vectors
from PIL import Image
from torch import Tensor, nn

import dinov3_infer
from dinov3_infer import Backbone
from dinov3_infer.model.vit import ViTConfig
from dinov3_infer.train import TrainConfig, train
from dinov3_infer.train.optim import clip_gradients, make_optimizer, set_rates

RECORDS = Path(__file__).parent / "records"
VIT = ViTConfig(192, 4, 3, 768, patch_size=8)
SIDE, LOCAL, NUM_LOCAL = 32, 16, 4  # pixels
SETTINGS = dict(
    from_scratch=True, batch_size=128, global_px=SIDE, local_px=LOCAL, num_local=NUM_LOCAL, local_scale=(0.1, 0.4),
    blur=False, precision="bfloat16", compile=True, recompute="none", ibot_weight=0.0, dino_prototypes=256,
    head_hidden=512, head_bottleneck=128, head_lr=1.0, freeze_share=0.0, ramp_share=0.0, layer_decay=1.0, patch_lr=1.0,
    rope_rescale=1.0, lr_at_1024=1.5e-3, lr_end_share=0.01, betas=(0.9, 0.999), ema_momentum=0.95,
    ema_momentum_end=0.995, health_steps=500, checkpoint_steps=500, workers=1, log_steps=50,
)  # fmt: skip


def start() -> Backbone:
    """Random weights with layer scales of 1; from 1e-5 a run needs hundreds of steps until they grow."""
    backbone = Backbone.from_config(VIT, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone.init_weights(layerscale=1.0)
    return backbone


def ours(config: TrainConfig, data: Pictures) -> Backbone:
    folder = Path(config.out)
    made = train(config, data=data, backbone=start(),
                 resume=(folder / "checkpoints").is_dir())  # fmt: skip
    shutil.copy(folder / "curves.png", RECORDS / "from_scratch.png")
    return made


class Crops(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """lightly's transform of the same images."""

    def __init__(self, pixels: np.ndarray) -> None:
        from lightly.transforms import DINOTransform

        self.pixels = pixels
        self.transform = DINOTransform(
            global_crop_size=SIDE, local_crop_size=LOCAL, n_local_views=NUM_LOCAL,
            local_crop_scale=SETTINGS["local_scale"], gaussian_blur=(0.0, 0.0, 0.0),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.pixels[index]))  # type: ignore[no-any-return]


def lightlys(config: TrainConfig, data: Pictures) -> Backbone:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.scheduler import cosine_schedule

    torch.manual_seed(0)

    def make() -> nn.ModuleDict:
        head = DINOProjectionHead(
            VIT.embed_dim, config.head_hidden, config.head_bottleneck, config.dino_prototypes, freeze_last_layer=1
        )
        backbone = start()
        backbone.set_attention("eager")  # with bfloat16 on a CPU faster than torch's fused attention
        return nn.ModuleDict({"backbone": backbone, "head": head}).train()

    def scores(model: nn.ModuleDict, crops: list[Tensor]) -> list[Tensor]:
        return list(model["head"](model["backbone"](torch.cat(crops)).cls_token).float().chunk(len(crops)))

    student, teacher = make(), make()
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    epoch = len(data) // config.batch_size  # steps
    loss_of = DINOLoss(output_dim=config.dino_prototypes, warmup_teacher_temp_epochs=5)
    optimizer = make_optimizer(student, config)
    loader = torch.utils.data.DataLoader(
        Crops(data.pixels), config.batch_size, shuffle=True, drop_last=True, num_workers=config.workers,
        persistent_workers=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    views = (batch for _ in range(1 + config.steps // epoch) for batch in loader)
    for step, crops in zip(range(config.steps), views, strict=False):
        set_rates(optimizer, config, step)
        momentum = cosine_schedule(step, config.steps, config.ema_momentum, config.ema_momentum_end)
        update_momentum(student, teacher, m=momentum)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                targets = scores(teacher, crops[:2])
            found = scores(student, crops[:2]) + scores(student, crops[2:])
        loss = loss_of(targets, found, epoch=step // epoch)
        optimizer.zero_grad()
        loss.backward()
        student["head"].cancel_last_layer_gradients(current_epoch=step // epoch)
        clip_gradients(student, config.clip)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"lightly: step {step + 1}, loss {float(loss):.4f}", flush=True)
    return teacher["backbone"].eval()  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=4500, help="optimiser steps (default: 4500)")
    parser.add_argument(
        "--only", nargs="+", choices=("ours", "lightly"), default=["ours", "lightly"], help="libraries (default: both)"
    )
    parser.add_argument("--change", type=json.loads, default={}, help="settings of the trainer to change, as JSON")
    args = parser.parse_args()
    config = TrainConfig(out=str(args.out / "ours"), steps=args.steps, **(SETTINGS | args.change))
    pixels, classes, asked, truth = cifar10(50_000, 10_000)
    data = Pictures(pixels, classes)

    def measured(model: Backbone | None) -> dict[str, list[float]]:
        known, wanted = vectors(pixels, model, SIDE), vectors(asked, model, SIDE)
        mean = known.mean(0)
        return {
            "knn": knn(known, classes, wanted, truth),
            "knn_centred": knn(known - mean, classes, wanted - mean, truth),
        }

    target = RECORDS / "from_scratch.json"

    def keep(**found: Any) -> None:
        """Adds to the record, beside the numbers of the other library."""
        print(found, flush=True)
        if not args.change:
            record = json.loads(target.read_text()) if target.is_file() else {}
            target.write_text(json.dumps(record | found, indent=1) + "\n")

    keep(
        what=f"ViT of {VIT.depth} blocks of width {VIT.embed_dim}, patches of {VIT.patch_size} pixels, CIFAR-10",
        settings={k: v for k, v in vars(config).items() if k not in ("model", "out", "data")},
        versions={"dinov3_infer": dinov3_infer.__version__, "torch": torch.__version__},
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        random=measured(start()),
        pixels=measured(None),
    )
    for name in args.only:
        begun = time.perf_counter()
        model = {"ours": ours, "lightly": lightlys}[name](config, data)
        found = {"minutes": round((time.perf_counter() - begun) / 60, 1), **measured(model)}
        if name == "ours":
            lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
            found["curve"] = [json.loads(line) for line in lines]
        keep(**{name: found})


if __name__ == "__main__":
    main()
