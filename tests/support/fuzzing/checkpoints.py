"""Damaged and hostile checkpoints: safetensors, shards and their index, config.json, files of torch.save."""

import json
import math
import os
import random
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .pickles import opcodes, rough, saved, zipped

Files = dict[str, bytes]
HEADER, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
NUMBERS = (0, 1, 2, 3, 4, 5, 7, 16, 32, 64, -1, 255, 2**16, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e300)
JSON = (None, True, "", "x", [], {}, [[]], [1, 2, 3], ["a", "b", "c"], {"a": 1}, "gelu", "dinov2", math.inf, math.nan)
FIELDS = ("model_type", "architecture", "rope_theta", "layer_norm_eps", "num_attention_heads", "hidden_act",
          "image_mean", "image_std", "pretrained_cfg", "dinov3_infer", "rope_parameters")  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "f32", None, 7)
SHARDS = ("../x.safetensors", "/etc/passwd", "..", ".", "", "a\nb.safetensors", "\0.safetensors", HEADER, CONFIG, INDEX,
          "shard-9.safetensors", "x" * 300 + ".safetensors", "caf\u00e9.safetensors", 7, None, [])  # fmt: skip


@cache
def wholes() -> dict[str, Files]:
    """Small models of every layout, in the files that hold them."""
    from dinov3_infer import Backbone, ViTConfig

    small = ViTConfig(embed_dim=16, depth=2, num_heads=2, ffn_dim=24, patch_size=4, num_registers=2)
    learned = ViTConfig(
        embed_dim=16, depth=1, num_heads=2, ffn_dim=24, patch_size=4, num_registers=0, position_grid=3, key_bias=True,
        norm_eps=1e-6, position_resize="offset",
    )  # fmt: skip
    gated = ViTConfig(embed_dim=16, depth=1, num_heads=1, ffn_dim=16, gated=True, patch_size=4, num_registers=0)
    found: dict[str, Files] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, config in (("v3", small), ("v2", learned), ("gated", gated)):
            model = Backbone.from_config(config, seed=0)
            folder = model.save_pretrained(Path(place, name))
            found[f"{name} hf"] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            for suffix in ("pth", "safetensors"):
                path = model.save_pretrained(Path(place, f"{name}.{suffix}"), layout="meta")
                found[f"{name} meta {suffix}"] = {path.name: path.read_bytes()}
            state = torch.load(Path(place, f"{name}.pth"), weights_only=True)
            teacher = {"epoch": 3, "teacher": {f"backbone.{n}": t for n, t in state.items()}, "loss": torch.ones(2)}
            torch.save(teacher, Path(place, "t.pth"), _use_new_zipfile_serialization=name == "v2")
            found[f"{name} wrapped"] = {"t.pth": Path(place, "t.pth").read_bytes()}
    for name in ("v3 hf", "v2 hf"):
        found[f"{name} shards"] = sharded(found[name])
    return found


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: str | bytes, data: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def packed(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A valid safetensors file."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return joined(json.dumps(header), data)


def unpacked(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    header, data = split(content)
    header.pop("__metadata__", None)
    return {n: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for n, v in header.items()}


def sharded(files: Files) -> Files:
    tensors = unpacked(files[HEADER])
    names = list(tensors)
    parts = {"shard-1.safetensors": names[::2], "shard-2.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    rest = {name: content for name, content in files.items() if name != HEADER}
    whole = {file: packed({name: tensors[name] for name in held}) for file, held in parts.items()}
    return {**rest, **whole, INDEX: json.dumps(index).encode()}


# --- safetensors -----------------------------------------------------------------------------------------------------


def valid(draw: random.Random, content: bytes) -> bytes:
    """Another valid file: with missing, renamed, reshaped, converted or additional tensors."""
    tensors = unpacked(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice(list(tensors))
        dtype, shape, data = tensors[name]
        kind = draw.randrange(8)
        if kind == 0 and len(tensors) > 1:
            del tensors[name]
        elif kind == 1:
            other = draw.choice(
                (name + ".extra", "x." + name, name.replace("0", "999"), name[::-1], "a\nb", "\u2028" * 9, "head.w")
            )
            tensors[other] = tensors.pop(name)
        elif kind == 2:
            tensors[name] = dtype, shape[::-1], data
        elif kind == 3:
            tensors[name] = dtype, draw.choice(([], [0], [0, 2**40], [1, *shape], [math.prod(shape)])), data
            count = math.prod(tensors[name][1])
            tensors[name] = dtype, tensors[name][1], data[: 4 * count].ljust(4 * count, b"\0")
        elif kind == 4:
            tensors[name] = (
                draw.choice(("I32", "U32", "F32")),
                shape,
                draw.choice((b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f")) * math.prod(shape),
            )
        elif kind == 5:
            tensors[name] = draw.choice(("F16", "BF16", "I16")), shape, data[: 2 * math.prod(shape)]
        elif kind == 6:
            longer = [*shape[:-1], shape[-1] + draw.choice((1, 2))] if shape else [1]
            tensors[name] = dtype, longer, bytes(4 * math.prod(longer))
        else:
            prefixes = (f"m{i}." for i in range(draw.choice((1, 2, 2000))))
            tensors |= {f"{p}{name}": (dtype, [0], b"") for p in prefixes}
    return packed(tensors)


def lying(draw: random.Random, content: bytes) -> bytes:
    """A file whose header does not match its data."""
    header, data = split(content)
    name = draw.choice(list(header))
    entry = header[name] if isinstance(header[name], dict) and "shape" in header[name] else {}
    kind = draw.randrange(9)
    if kind == 0:
        entry["data_offsets"] = [draw.choice((*NUMBERS, len(data))), draw.choice((*NUMBERS, len(data)))]
    elif kind == 1:
        entry["shape"] = draw.choice(
            ([draw.choice(NUMBERS)], [draw.choice(NUMBERS)] * 3, [1] * 9999, draw.choice(JSON))
        )
    elif kind == 2:
        entry["dtype"] = draw.choice(DTYPES)
    elif kind == 3:
        entry["data_offsets"] = draw.choice((*JSON, [0], [8, 0], [0.0, 4.0], ["0", "4"]))
    elif kind == 4:
        header["__metadata__"] = draw.choice(({"format": 3}, {"a": {"b": 1}}, *JSON))
    elif kind == 5:
        header[name] = draw.choice(JSON)
    elif kind == 6:
        return joined("[" * 9999 + "]" * 9999, data)
    elif kind == 7:
        text = json.dumps(header)
        return joined(text[:-1] + "," + json.dumps({name: header[name]})[1:], data)  # one name twice
    else:
        text = json.dumps(header)
        at = draw.randrange(len(text))
        return joined(text[:at] + draw.choice(("", '"', "}", "\0", "\ud800", "1", text)) + text[at + 1 :], data)
    return joined(json.dumps(header), data)


# --- JSON ------------------------------------------------------------------------------------------------------------


def config(draw: random.Random, content: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.1:
        return rough(draw, content) if content else b"{"
    if kind < 0.15:
        return draw.choice(
            (
                b"[" * 99999,
                b"3",
                b"null",
                b"[]",
                b'{"a":' * 900 + b"1" + b"}" * 900,
                b'{"a": ' + b"9" * 5000 + b"}",
                b" " * (2**22 + 9),
            )
        )
    values = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        number = draw.choice(NUMBERS)
        strange = (
            "dinov3_vit", json.loads("[" * 400 + "]" * 400), [0.5, 0.5, number], {"rope_theta": number},
            {"mean": [0, 0, 0.5], "std": [1, 1, number], "tag": []}, {"rope_periods": [1.0, number], "name": []},
        )  # fmt: skip
        values[draw.choice([*values, *FIELDS])] = draw.choice((*JSON, *NUMBERS, *strange))
    return json.dumps(values).encode("utf-8", "surrogatepass")


def index(draw: random.Random, content: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.2:
        return config(draw, content)
    values = json.loads(content)
    if kind < 0.3:
        values["weight_map"] = draw.choice(JSON)
    else:
        for name in draw.sample(list(values["weight_map"]), draw.choice((1, 2))):
            values["weight_map"][draw.choice((name, name + "x"))] = draw.choice(SHARDS)
    return json.dumps(values).encode()


# --- a case ----------------------------------------------------------------------------------------------------------


def magic(content: bytes) -> bool:
    """Whether the first bytes are those of a weights file."""
    if content.startswith((b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        return True
    return content[8:9] == b"{" and 0 < int.from_bytes(content[:8], "little") <= len(content) - 8


def mutate(draw: random.Random, files: Files) -> Files:
    files = dict(files)
    chosen = draw.choice(list(files))
    content = files[chosen]
    if chosen == INDEX:
        how = [index]
    elif chosen.endswith(".json"):
        how = [config]
    elif chosen.endswith(".safetensors"):
        how = [valid, valid, lying, lying, rough]
    else:
        how = [saved, saved, zipped, zipped, rough] if content.startswith(b"PK") else [saved, opcodes, rough]
    try:
        files[chosen] = draw.choice(how)(draw, content)
    except Exception:  # it was damaged already
        files[chosen] = rough(draw, content)
    if len(files) > 1 and draw.random() < 0.1:
        del files[draw.choice(list(files))]
    return files


def case(draw: random.Random, folder: Path) -> tuple[Any, bool]:
    """An argument of `from_pretrained`, and whether its first bytes look like weights."""
    files = draw.choice(list(wholes().values()))
    for _ in range(draw.choice((1, 1, 1, 2))):
        if files:
            files = mutate(draw, files)
    target = folder / draw.choice(("m", "new\nline", os.fsdecode(b"\xff\xfe"), "caf\u00e9"))
    target.mkdir()
    for name, content in files.items():
        (target / name).write_bytes(content)
    weights = [name for name in files if not name.endswith(".json")]
    looks_right = bool(weights) and all(magic(files[name]) for name in weights)
    if len(files) == 1 and draw.random() < 0.8:
        return target / next(iter(files)), looks_right
    if INDEX in files and draw.random() < 0.3:
        return target / INDEX, looks_right
    return target, looks_right
