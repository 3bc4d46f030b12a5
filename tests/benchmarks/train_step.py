"""Time of a training step, against one built from transformers' DINOv3 ViT and lightly's heads and losses.

    pip install lightly torchvision transformers
    python tests/benchmarks/train_step.py [--model dinov3_vits16] [--batch 8] [--dtype float32] [--threads 2]

Both see the same crops, masks, weights and settings: two global crops of 224 pixels, eight local ones of 96, DINO,
iBOT and KoLeo with centred softmax and prototypes of length 1 (as lightly has them), clipping per part, AdamW, moving
average.  The losses must agree before the steps are timed.

Rounds alternate; the ratio is the median over the rounds of the peers' time divided by ours.  Memory is the growth of
the resident set (on a GPU: of what torch allocates) at its peak, with each contender in a separate process.  The record
is written to records/train_step_DEVICE_DTYPE.json.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent), str(HERE.parent)]

import conftest  # noqa: E402, F401  (lets a CUDA build of torchvision be imported beside a CPU build of torch)
import lightly  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss  # noqa: E402
from lightly.models.modules.heads import DINOProjectionHead  # noqa: E402
from lightly.models.utils import update_momentum  # noqa: E402
from made_from import commit  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import DINOv3ViTConfig, DINOv3ViTModel  # noqa: E402

from dinov3_infer import Backbone  # noqa: E402
from dinov3_infer.train.blocks import wrap_blocks  # noqa: E402
from dinov3_infer.train.config import TrainConfig  # noqa: E402
from dinov3_infer.train.method import Method  # noqa: E402
from dinov3_infer.train.optim import clip_gradients, make_optimizer, set_rates  # noqa: E402
from dinov3_infer.train.views import Batch  # noqa: E402

LOCAL, PROTOTYPES = 8, 16_384


def settings(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        batch_size=args.batch, centring="centre", unit_prototypes=True, freeze_share=0.0, ramp_share=0.0,
        rope_rescale=1.0, spread_group=args.batch, steps=100, teacher_temperature_share=0.0, warmup_share=0.0,
        dino_prototypes=PROTOTYPES, ibot_prototypes=PROTOTYPES, layer_decay=1.0, patch_lr=1.0, weight_decay=0.0,
        weight_decay_end=0.0, ema_momentum=0.994, ema_momentum_end=0.994, standardise=False, head_lr=1.0,
        teacher_temperature=0.07,
    )  # fmt: skip


def start(args: argparse.Namespace) -> Backbone:
    """Random weights with which images differ; otherwise KoLeo's gradients would be rounding errors."""
    backbone = Backbone.from_config(args.model, seed=0)
    backbone.init_weights(layerscale=0.5)
    with torch.no_grad():
        for parameter in backbone.blocks.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return backbone


class Ours:
    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.config = settings(args)
        torch.manual_seed(0)
        self.method = Method(self.config, start(args)).to(device).train()
        wrap_blocks(self.method.backbone, False, self.config.recompute)
        wrap_blocks(self.method.average, False, "none")
        self.optimizer = make_optimizer(self.method.student, self.config)

    def step(self, batch: Batch, amp: torch.autocast) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with amp:
            target = self.method.targets([batch], 0)[0]
            loss = self.method(batch, target, 0)["loss"]
        loss.backward()
        set_rates(self.optimizer, self.config, 0)
        clip_gradients(self.method.student, self.config.clip)
        self.optimizer.step()
        self.method.update_ema(0)
        return loss.detach()


class Peers:
    """The same step from transformers and lightly, as a user of both would write it."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.config = settings(args)
        torch.manual_seed(0)
        mine = Method(self.config, start(args)).student  # for its weights
        c = mine["backbone"].config
        config = DINOv3ViTConfig(
            hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads,
            intermediate_size=c.ffn_dim, num_register_tokens=c.num_registers, patch_size=c.patch_size,
            layerscale_value=1e-5, pos_embed_rescale=None, attn_implementation="sdpa",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            mine["backbone"].save_pretrained(folder)
            backbone = DINOv3ViTModel.from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation="sdpa"
            )
        heads = [DINOProjectionHead(c.embed_dim, 2048, 256, PROTOTYPES) for _ in range(2)]
        with torch.no_grad():
            for head, name in zip(heads, ("dino_head", "ibot_head"), strict=True):
                ours = mine[name]
                linears = [m for m in head.layers if isinstance(m, nn.Linear)]
                for linear, source in zip(linears, [m for m in ours.mlp if isinstance(m, nn.Linear)], strict=True):
                    linear.load_state_dict(source.state_dict())
                head.last_layer.weight_v.copy_(ours.prototypes.weight)
        self.student = nn.ModuleDict({"backbone": backbone, "dino": heads[0], "ibot": heads[1]}).to(device).train()
        self.student["backbone"].embeddings.mask_token.requires_grad_(True)
        self.teacher = nn.ModuleDict({k: _copy(m) for k, m in self.student.items()}).eval().requires_grad_(False)
        self.dino = DINOLoss(PROTOTYPES).to(device)
        self.ibot = IBOTPatchLoss(PROTOTYPES).to(device)
        self.koleo = KoLeoLoss().to(device)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=self.config.lr, betas=self.config.betas, weight_decay=0.0, fused=True
        )
        self.prefix = 1 + c.num_registers

    def step(self, batch: Batch, amp: torch.autocast) -> Tensor:
        student, teacher, half, temperature = self.student, self.teacher, len(batch.indices), 0.07
        self.optimizer.zero_grad(set_to_none=True)
        with amp:
            with torch.no_grad():
                seen = teacher["backbone"](batch.global_crops).last_hidden_state
                targets = teacher["dino"](seen[:, 0])
                patch_targets = teacher["ibot"](seen[:, self.prefix :][batch.masks])
            out = student["backbone"](batch.global_crops, bool_masked_pos=batch.masks).last_hidden_state
            local = student["backbone"](batch.local_crops).last_hidden_state
            scores = student["dino"](torch.cat((out[:, 0], local[:, 0])))
            patches = student["ibot"](out[:, self.prefix :][batch.masks])
            side = int(batch.masks.shape[1] ** 0.5)
            loss = self.dino(list(targets.split(half)), list(scores.split(half)), teacher_temp=temperature)
            mask = batch.masks.unflatten(1, (side, side))
            loss = loss + self.ibot(patch_targets, patches, mask, teacher_temp=temperature)
            loss = loss + 0.1 * sum(self.koleo(crop) for crop in out[:, 0].split(half))
        loss.backward()
        for part in student.values():
            nn.utils.clip_grad_norm_(part.parameters(), self.config.clip)
        self.optimizer.step()
        update_momentum(student, teacher, 0.994)
        return loss.detach()


def _copy(module: nn.Module) -> nn.Module:
    """A copy of a head of lightly, whose old-style weight norm deepcopy cannot copy."""
    for child in module.modules():
        if hasattr(child, "weight_v"):
            child.__dict__.pop("weight", None)
    return copy.deepcopy(module)


def batch_of(args: argparse.Namespace, device: torch.device) -> Batch:
    draw = torch.Generator().manual_seed(1)
    b = args.batch
    masks = torch.zeros(2 * b, 196, dtype=torch.bool)
    for row in range(0, 2 * b, 2):  # half of the crops, 30 % of the patches
        masks[row, torch.randperm(196, generator=draw)[:59]] = True
    crops = torch.randn(2 * b, 3, 224, 224, generator=draw), torch.randn(LOCAL * b, 3, 96, 96, generator=draw)
    return Batch(*(c.to(device) for c in crops), None, masks.to(device), torch.arange(b))


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_memory(name: str, args: argparse.Namespace, device: torch.device, amp: torch.autocast) -> None:
    """Prints the peak memory of three steps in MiB: weights, gradients, moments and activations."""
    contender = {"ours": Ours, "peers": Peers}[name](args, device)
    batch = batch_of(args, device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS") - sum(p.nbytes for p in contender_parameters(contender)) / 2**20
    for _ in range(3):
        contender.step(batch, amp)
    print(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident("VmHWM") - before)


def resident(field: str) -> float:
    """Resident memory in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def contender_parameters(contender: Ours | Peers) -> list[Tensor]:
    modules = vars(contender).values()
    return [p for module in modules if isinstance(module, nn.Module) for p in module.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="dinov3_vits16", help="model (default: dinov3_vits16)")
    parser.add_argument("--batch", type=int, default=8, help="images per batch (default: 8)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="arithmetic (default: float32)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (default: cuda or cpu)"
    )
    parser.add_argument(
        "--memory", choices=["ours", "peers"], help="measure the peak memory of one side instead of the time"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    if args.memory:
        return measure_memory(args.memory, args, device, amp)

    contenders = {"ours": Ours(args, device), "peers": Peers(args, device)}
    batch = batch_of(args, device)
    losses = {name: [float(c.step(batch, amp)) for _ in range(3)] for name, c in contenders.items()}
    for a, b in zip(*losses.values(), strict=True):
        assert abs(a - b) < (1e-3 if args.dtype == "float32" else 5e-2) * abs(b), losses
    rounds = []
    for i in range(args.rounds):
        took = {}
        for name in ("ours", "peers") if i % 2 else ("peers", "ours"):
            begun = wait(device)
            contenders[name].step(batch, amp)
            took[name] = wait(device) - begun
        rounds.append(took)
    ratios = sorted(r["peers"] / r["ours"] for r in rounds)
    memory = {
        name: float(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--memory", name], capture_output=True,
                                   text=True, check=True).stdout.split()[-1])
        for name in contenders
    }  # fmt: skip
    record = {
        "what": f"{args.model}, 2 x 224 and {LOCAL} x 96 pixels",
        "settings": {name: getattr(args, name) for name in ("batch", "dtype", "threads", "rounds")},
        "losses_of_the_first_steps": losses,
        "speed_ratio": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in contenders},
        "peak_mib": memory,
        "memory_ratio": memory["ours"] / memory["peers"],
        "rounds": rounds,
        "commit": commit(),
        "machine": {"platform": platform.platform(), "load_average": os.getloadavg()[0], "device": str(device)},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, lightly)},
    }  # fmt: skip
    target = HERE / "records" / f"train_step_{device.type}_{args.dtype}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print({k: record[k] for k in ("losses_of_the_first_steps", "speed_ratio", "seconds", "peak_mib", "memory_ratio")})


if __name__ == "__main__":
    main()
