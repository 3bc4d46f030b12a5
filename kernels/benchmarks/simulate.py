"""A simulation of whole forward passes on an H200.  No GPU has confirmed any of its numbers.

    python kernels/benchmarks/simulate.py                      # the table, into records/simulated.json and the README
    python kernels/benchmarks/simulate.py --where L 224 64     # the slowest operators of one cell

`tracing` records the operators that the code calls on fake tensors, and a timeline is made of them: the host issues one
after the other, the GPU runs them in order, a synchronisation waits.  A kernel takes max(bytes / bandwidth, FLOPs /
rate), at least a floor.  All times begin on the host.  Ours begin with uint8 images in pinned memory and end with the
check of the result.  Those of transformers and timm begin with float32 pixels in pageable memory, as their processors
return them, and end without a check; the better of bfloat16 weights and autocast counts.

Constants and where they come from:

  bandwidth 4.3 TB/s, 790 TFLOP/s (a copy and an 8192^3 bfloat16 product, published measurements on an H200)
  share of the bandwidth that eager elementwise kernels reach 0.84, layer norm 0.75, a fused row kernel 0.90
  what fits the L2 (60 MB; taken as up to 30 MB of traffic) runs at 5.5 TB/s (published H100 L2 readings 5.5 to 7)
  floor of a kernel 2.2 us between neighbours in a queue (published: 2 to 3 us)
  products: tiles of cuBLAS in waves over 132 SMs, each tile costing K + 450 steps
  attention: published asymptotes and their loss at short lengths, times the useful share of the tiles
  host, per call: kernel 4.0 us (0.85 dispatch measured on a CPU, allocation, 2.2 cudaLaunchKernel), product 9 (cuBLASLt
  asks its heuristic each time), layer norm 6, SDPA 12, view 0.75 and module 0.8 (measured on a CPU), our attention 30
  (measured with a driver that launches nothing: 26; plus launch and device guard), our other kernels 12, the replay of
  a graph 10 (assumed).  Whether the model has changed is looked at in each call, as one module call for each module.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import train_tracing
from tracing import Op, ours, plain

from dinov3_infer import Backbone
from dinov3_infer.checkpoints.config_json import hf_config
from dinov3_infer.zoo import ARCHITECTURES

HERE = Path(__file__).resolve().parent
RECORD = HERE / "records" / "simulated.json"
README = HERE.parent / "README.md"

# --- the chip: an H200 ---------------------------------------------------------------------------------------------

BW, FLOPS, SMS, L2, L2_BW = 4.3e12, 790e12, 132, 30e6, 5.5e12
SDPA, OURS, L2_READ = (413e12, 615e12), (370e12, 450e12), 6.0e12  # of heads of 64 and of 128 channels
EAGER, NORM, FUSED = 0.84, 0.75, 0.90
FLOOR = 2.2e-6
K0 = 450
PAGEABLE, PINNED = 12e9, 50e9  # host to device, bytes a second (PCIe 5 x16: about 55 at best; pageable copies 8 to 15)
HOST = dict(
    kernel=4.0, product=9.0, norm=6.0, sdpa=12.0, view=0.75, module=0.8, triton=30.0, sync=8.0, copy=12.0, conv=25.0,
    fused=12.0, replay=10.0,
)  # fmt: skip
GAP = 0.7e-6  # less between the kernels of a graph
_CALLS = {
    "product": "product", "norm": "norm", "sdpa": "sdpa", "ours": "triton", "copy": "copy",
    "pinned": "copy", "conv": "conv", "fused": "fused",
}  # fmt: skip


def on_gpu(op: Op) -> float:
    """Seconds."""
    if op.kernels == 0:
        return 0.0
    if op.kind == "product":
        return product_time(*op.shape)
    if op.kind in ("sdpa", "ours"):
        return max(attention_time(op.kind, op.shape, op.tile), op.bytes / BW) + 0.5e-6
    if op.kind == "conv":
        return max(product_time(*op.shape) * 2.0, op.bytes / (BW * EAGER)) + (op.kernels - 1) * FLOOR
    if op.kind in ("copy", "pinned"):
        return 3e-6 + op.bytes / (PAGEABLE if op.kind == "copy" else PINNED)
    share = {"norm": NORM, "fused": FUSED}.get(op.kind, EAGER)
    each = op.bytes / op.kernels
    return op.kernels * max(FLOOR, 1.0e-6 + each / ((L2_BW if each < L2 else BW) * share))


def on_host(op: Op) -> float:
    """Seconds."""
    if op.replayed:
        return 0.0
    if op.kind in ("view", "module", "sync", "replay"):
        return HOST[op.kind] * 1e-6
    return max(1, op.kernels) * HOST[_CALLS.get(op.kind, "kernel")] * 1e-6


@cache
def product_time(m: int, n: int, k: int) -> float:
    """The best of some tiles and splits of K, in waves over the SMs; never less than the time of its bytes."""
    best = math.inf
    tiles = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.85), (128, 64, 0.68), (64, 128, 0.68), (64, 64, 0.5))
    for tm, tn, share in tiles:
        for split in (1, 2, 4, 8):
            if k // split < 128:
                continue
            waves = math.ceil(math.ceil(m / tm) * math.ceil(n / tn) * split / SMS)
            time = waves * 2.0 * tm * tn * (k / split + K0) / (FLOPS / SMS * share)
            best = min(best, time + (FLOOR if split > 1 else 0.0))
    moved = 2 * (m * k + n * k) + 2 * m * n
    return max(FLOOR, best, 1e-6 + moved / (BW * 0.9))


@cache
def attention_time(kind: str, shape: tuple[int, ...], tile: tuple[int, int, bool, int]) -> float:
    """Of torch's on Hopper ("sdpa", 128 x 128), and of ours with the tiles and tables that it is launched with.

    A program reads keys, values and tables from L2 once for every tile of queries.
    """
    b, h, n, d = shape
    rows, step, whole, table = (128, 128, False, 0) if kind == "sdpa" else tile
    wide = int(d == 128)
    if whole:
        read = b * h * n * (6.0 * d + 2 * d * table)
        return max(4.0 * b * h * n * n * d / (OURS[0] * 0.9), read / L2_READ)
    if kind == "sdpa":
        keys, rate = up(n, 128), SDPA[wide] * n / (n + 115)
    else:
        rest = n % step
        keys = n // step * step + (max(16, 1 << (rest - 1).bit_length()) if rest else 0)
        rate = OURS[wide] * n / (n + 95)
    blocks, work = b * h * up(n, rows) // rows, 4.0 * rows * keys * d
    read = blocks * (rows * d * (2 + table) + keys * d * (4.0 + table))
    alone = math.ceil(blocks / (2 * SMS)) * work / (rate / SMS * 0.6)
    return max(blocks * work / rate, alone, read / L2_READ)


def up(x: int, step: int) -> int:
    return -(-x // step) * step


def timeline(ops: Sequence[Op]) -> dict[str, float]:
    """Seconds of host, GPU and wall, kernels, and bytes that these moved."""
    host = gpu = busy = 0.0
    for op in ops:
        host += on_host(op)
        if op.kind == "sync":
            host = max(host, gpu) + 4e-6
            continue
        took = on_gpu(op)
        if op.kind == "copy":  # pageable memory: the host waits
            gpu = host = max(gpu, host) + took
        elif took:
            gpu = max(gpu - (GAP if op.replayed else 0.0), host) + took
        busy += took
    kernels = sum(op.kernels for op in ops)
    moved = sum(op.bytes for op in ops if op.kind not in ("copy", "pinned"))
    return dict(wall=max(host, gpu), host=host, gpu=busy, kernels=kernels, bytes=moved)


# --- the contestants -----------------------------------------------------------------------------------------------

NAMES = dict(S="vits16", B="vitb16", L="vitl16") | {"H+": "vith16plus", "7B": "vit7b16"}
TIMM = dict(S="small", B="base", L="large") | {"H+": "huge_plus", "7B": "7b"}
# cell -> the least ratio of the time of transformers to that of the plan
WANTED = {
    ("S", 224, 64): 1.25, ("B", 224, 64): 1.25, ("L", 224, 64): 1.25, ("H+", 224, 64): 1.1, ("7B", 224, 8): 1.1,
    ("L", 1024, 8): 1.1, ("S", 224, 1): 4.0, ("B", 224, 1): 4.0, ("L", 224, 1): 4.0,
}  # fmt: skip
MORE = (("S", 512, 8), ("S", 1024, 8), ("L", 224, 8), ("L", 512, 8), ("H+", 224, 1), ("7B", 224, 1))
BF16 = torch.bfloat16


def built(who: str, model: str, size: int) -> Any:
    """On "meta"."""
    config = ARCHITECTURES[f"dinov3_{NAMES[model]}"]
    with torch.device("meta"):
        if who == "ours":
            return Backbone.from_config(config)
        if who == "transformers":
            from transformers import DINOv3ViTConfig, DINOv3ViTModel

            return DINOv3ViTModel(DINOv3ViTConfig(**hf_config(config), attn_implementation="sdpa")).eval()
        import timm

        name = f"vit_{TIMM[model]}_patch16_dinov3"
        return timm.create_model(name, pretrained=False, img_size=size, num_classes=0).eval()


def contestant(who: str, model: str, size: int, batch: int) -> list[Op]:
    config = ARCHITECTURES[f"dinov3_{NAMES[model]}"]
    if who == "plan":
        modules = sum(1 for _ in built("ours", model, size).modules())
        # parameters of the 7B model are given as bfloat16, since float32 ones leave little room
        found = ours(config, batch, [(size, size)], dtype=BF16 if model == "7B" else None)
        return [Op("is the model the same?", "module")] * modules + found
    name, autocast = who.removesuffix(" autocast"), who.endswith("autocast")
    return plain(built(name, model, size), batch, (size, size), autocast, None if autocast else BF16)


def cell(model: str, size: int, batch: int, timm: bool = True) -> dict[str, dict[str, float]]:
    peers = ("transformers", "timm") if timm else ("transformers",)
    whos = ["plan", "ours autocast", *(name + how for name in peers for how in ("", " autocast"))]
    return {who: timeline(contestant(who, model, size, batch)) for who in whos}


def ratio(found: dict[str, dict[str, float]], peer: str) -> float:
    """The time of the better form of a peer divided by that of the plan."""
    return min(found[peer]["wall"], found[f"{peer} autocast"]["wall"]) / found["plan"]["wall"]


# model, pixels, images of the blocks of a training step, each with and without activations computed twice
TRAINED = (("S", 256, 64), ("B", 256, 64), ("L", 256, 64))


def training(model: str, size: int, batch: int) -> dict[str, dict[str, float]]:
    """Forward and backward of all blocks, with torch's norms ("separate") and with those of one kernel ("fused")."""
    config = ARCHITECTURES[f"dinov3_{NAMES[model]}"]
    return {
        f"{how} {recompute}": timeline(train_tracing.step(config, batch, size, how == "fused", recompute))
        for recompute in ("none", "cheap") for how in ("separate", "fused")
    }  # fmt: skip


# --- the table -----------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    heads = [f"{who}: kernels | GB | ms" for who in ("plan", "as written, autocast", "transformers")]
    ends = ["transformers / plan", "wanted", "timm / plan"]
    lines = ["| " + " | ".join(["model, pixels, images", *heads, *ends]) + " |", "| --- " * 13 + "|"]
    for name, found in record["cells"].items():
        model, size, batch = name.split()
        row = [name.replace(" ", ", ")]
        best = min(("transformers", "transformers autocast"), key=lambda who: found[who]["wall"])
        for who in ("plan", "ours autocast", best):
            f = found[who]
            row += [f"{f['kernels']:.0f}", f"{f['bytes'] / 1e9:.2f}", f"{f['wall'] * 1e3:.2f}"]
        wanted = WANTED.get((model, int(size), int(batch)))
        row += [
            f"{ratio(found, 'transformers'):.2f}",
            "" if wanted is None else str(wanted),
            f"{ratio(found, 'timm'):.2f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def training_table(record: dict[str, Any]) -> str:
    heads = [f"{how}: kernels | GB | ms" for how in ("torch's norms", "one kernel each")]
    lines = ["| " + " | ".join(["model, pixels, images", "`recompute`", *heads, "separate / fused"]) + " |"]
    lines.append("| --- " * 9 + "|")
    for name, found in record["training"].items():
        for recompute in ("none", "cheap"):
            both = [found[f"{how} {recompute}"] for how in ("separate", "fused")]
            row = [name.replace(" ", ", "), recompute]
            for f in both:
                row += [f"{f['kernels']:.0f}", f"{f['bytes'] / 1e9:.2f}", f"{f['wall'] * 1e3:.2f}"]
            lines.append("| " + " | ".join([*row, f"{both[0]['wall'] / both[1]['wall']:.2f}"]) + " |")
    return "\n".join(lines)


def filled(text: str, record: dict[str, Any]) -> str:
    """The README with the tables between their marks."""
    for name, content in (("simulated", table(record)), ("trained", training_table(record))):
        before, _, rest = text.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}<!-- {name} -->\n{content}\n<!-- /{name} -->{after}"
    return text


def where(model: str, size: int, batch: int) -> None:
    for who in ("plan", "ours autocast", "transformers"):
        ops = contestant(who, model, size, batch)
        t = timeline(ops)
        print(
            f"\n{who}: {model} {size} px batch {batch}: wall {t['wall'] * 1e3:.2f} ms, GPU busy {t['gpu'] * 1e3:.2f}, "
            f"host {t['host'] * 1e3:.2f}, {t['kernels']} kernels, {t['bytes'] / 1e9:.2f} GB (simulated)"
        )
        groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
        for op in ops:
            amounts = (op.kernels or 1, on_gpu(op) * 1e3, op.bytes / 1e9, on_host(op) * 1e3)
            group = groups[f"{op.kind}: {op.name.split()[0]}"]
            group[:] = [a + b for a, b in zip(group, amounts, strict=True)]
        for name, (count, ms, gb, host) in sorted(groups.items(), key=lambda kv: -kv[1][1])[:18]:
            print(f"   {name:34} {count:6.0f} x  {ms:8.3f} ms GPU  {gb:8.3f} GB  host {host:6.3f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", nargs=3, metavar=("MODEL", "PIXELS", "IMAGES"))
    args = parser.parse_args()
    sys.path.append(str(HERE.parent.parent / "tests"))
    import conftest  # noqa: F401  (lets a CUDA build of torchvision be imported beside a CPU build of torch)

    if args.where:
        where(args.where[0], int(args.where[1]), int(args.where[2]))
        return 0
    record: dict[str, Any] = {"simulation": True, "chip": "H200", "cells": {}, "training": {}}
    for name in (*WANTED, *MORE):
        found = record["cells"][" ".join(map(str, name))] = cell(*name)
        print(*name, *(f"{who} {f['wall'] * 1e3:.2f} ms" for who, f in found.items()), sep=", ", flush=True)
    for name in TRAINED:
        found = record["training"][" ".join(map(str, name))] = training(*name)
        print("training", *name, *(f"{who} {f['wall'] * 1e3:.2f} ms" for who, f in found.items()), sep=", ", flush=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    README.write_text(filled(README.read_text(encoding="utf-8"), record), encoding="utf-8")
    print(table(record), training_table(record), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
