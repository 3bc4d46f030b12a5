"""A file that is no checkpoint, or no whole one, is refused with one sentence that says what it is."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import (
    SOURCES,
    State,
    in_memory,
    load,
    meta_named,
    put,
    small_models_are_known as small_models_are_known,
    timm_name,
    timm_named,
    wrapped,
)
from oracles import hf_model
from pictures import complaint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinov3_infer import Backbone, CheckpointError, Dinov3Error, ModelNotFoundError
from dinov3_infer.checkpoints.reading import kind_of
from dinov3_infer.errors import MissingFileError, UnsupportedError

CONFIG = SOURCES["dinov3"]


def state() -> State:
    return meta_named(hf_model(CONFIG).state_dict(), CONFIG)


def hub(folder: Path) -> Path:
    hf_model(CONFIG).save_pretrained(folder, max_shard_size="60KB")
    return folder


def refused(path: Path, says: str, kind: type[Dinov3Error] = CheckpointError, named: str = "") -> str:
    """Loads, and returns the error after the checks that hold for all errors."""
    with pytest.raises(kind) as caught:
        load(path)
    message = str(caught.value)
    assert re.search(says, message), message
    assert (named or path.name) in message
    assert "\n" not in message and not re.search(r"0x[0-9a-f]{4}|weights_only", message), message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # no second traceback above it
    return message


def whole(folder: Path, name: str) -> bytes:
    return put(folder, state(), None, name).read_bytes()


# Not a checkpoint


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (b"<!DOCTYPE html><html>403</html>", r"it starts with '<!DOC', as an error page does \(31 bytes\)"),
        (b"<?xml version='1.0'?><Error/>", r"'<\?xml', as an error page does"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"\x00\x01garbage of no kind at all" * 9, "it starts with"),
        (b"{}", "it starts with"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "cut short"),
    ],
    ids=["empty", "html", "xml", "lfs", "garbage", "json", "header_only"],
)
def test_other_content(content: bytes, says: str, name: str, tmp_path: Path) -> None:
    """The first bytes decide, whatever the file is called."""
    path = tmp_path / name
    path.write_bytes(content)
    assert "download it again" in refused(path, says)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "legacy.pth"])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_cut_short(name: str, share: float, tmp_path: Path) -> None:
    """An interrupted download, cut near its end, halfway and near its beginning."""
    content = whole(tmp_path / "whole", name)
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, "download it again")


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    """A safetensors header that is no JSON, and a zip without its pickle."""
    content = bytearray(whole(tmp_path / "whole", "x.safetensors"))
    content[9:40] = b"\xff" * 31
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", "download it again")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    refused(tmp_path / "x.pth", "download it again")


class Trap:
    """Unpickling this class creates the file `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path(self.path).touch, ()


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_does_not_run(how: str, tmp_path: Path) -> None:
    """A pickle that would run code is refused before it runs."""
    path, proof = tmp_path / "x.pth", tmp_path / "proof"
    content = {"cls_token": torch.zeros(1), "trap": Trap(str(proof))}
    if how == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    torch.load(path, weights_only=False) if how != "plain" else pickle.loads(path.read_bytes())
    assert proof.exists()  # the trap is one
    proof.unlink()
    refused(path, "could run code")
    assert not proof.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    """For torch.save(model) the error says what to save instead."""
    torch.save(nn.Linear(3, 3), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", re.escape("torch.save(model.state_dict(), ...)"))


# Directories


def test_directories(tmp_path: Path) -> None:
    """For a folder with no, several or sharded training weights the error names its files."""
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "found none")
    for name in ("a.pth", "b.pth"):
        put(tmp_path / "two", state(), None, name)
    refused(tmp_path / "two", r"found a\.pth, b\.pth; give the file itself")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    (tmp_path / "dcp" / "__0_0.distcp").touch()
    refused(tmp_path / "dcp", "dcp_to_torch_save")
    (tmp_path / "one").mkdir()
    put(tmp_path / "one", state(), None, "any_name.pth")
    (tmp_path / "one" / "README.md").touch()
    assert load(tmp_path / "one").config.depth == 2


@pytest.mark.parametrize(
    ("target", "says"),
    [("../elsewhere.safetensors", "outside its folder"), ("/etc/passwd", "outside its folder"),
     ("model-missing.safetensors", r"'model-missing\.safetensors', which is not there"), (7, "no weight_map")],
    ids=["above", "absolute", "missing", "number"],
)  # fmt: skip
def test_index_of_shards(target: Any, says: str, tmp_path: Path) -> None:
    """An index may not lead out of its folder, and every shard must exist."""
    save_file(state(), tmp_path / "elsewhere.safetensors")
    index = hub(tmp_path / "m") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["norm.weight"] = target
    index.write_text(json.dumps(content))
    refused(tmp_path / "m", says, named="model.safetensors.index.json")


def test_index_lists_what_no_shard_holds(tmp_path: Path) -> None:
    """A listed tensor that no shard holds is an error, even if the model does not need it."""
    index = hub(tmp_path) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["embeddings.mask_token"]
    kept = {n: t for n, t in load_file(tmp_path / shard).items() if n != "embeddings.mask_token"}
    save_file(kept, tmp_path / shard)
    refused(tmp_path, r"embeddings\.mask_token", named=index.name)


@pytest.mark.parametrize(
    "content", ["{not json", "[1, 2]", "\xff", "[" * 100_000], ids=["broken", "list", "bytes", "deep"]
)
def test_config_that_is_no_json(content: str, tmp_path: Path) -> None:
    (hub(tmp_path) / "config.json").write_bytes(content.encode("latin-1"))
    refused(tmp_path, "JSON", named="config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 5), ("num_attention_heads", 0), ("num_attention_heads", "four"),
     ("num_hidden_layers", 3), ("hidden_size", 128), ("num_register_tokens", 7)],
)  # fmt: skip
def test_config_that_contradicts_the_tensors(field: str, value: Any, tmp_path: Path) -> None:
    """If config.json and the tensors contradict each other, the file is incomplete or mixed up."""
    path = hub(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refused(tmp_path, field.rpartition("_")[2])


# Other models


def test_other_models(tmp_path: Path) -> None:
    """For a part of a ConvNeXt in two layouts, a head alone and no tensors, the error says what the file is."""
    convnext = {
        "downsample_layers.0.0.weight": torch.ones(4, 3, 4, 4),
        "stages.0.0.dwconv.weight": torch.ones(4, 1, 7, 7),
    }
    refused(
        put(tmp_path / "a", convnext, None, "convnext.pth"),
        r"layout meta \(convnext\), but 'stages.0.0.pwconv1.weight' is missing",
    )
    names = ("stages.0.downsample_layers.0.weight", "stages.0.layers.0.depthwise_conv.weight")  # transformers' own
    strange = {n: torch.ones(4, 1, 7, 7) for n in names}
    with pytest.raises(UnsupportedError, match="the convolution before stage 0"):
        load(put(tmp_path / "b", strange, {"model_type": "dinov3_convnext"}))
    head = {"head.mlp.0.weight": torch.ones(3, 64), "head.mlp.0.bias": torch.ones(3)}
    refused(put(tmp_path / "c", head, None, "head.pth"), "a head without its backbone")
    refused(put(tmp_path / "d", {"epoch": 3}, None, "empty.pth"), "no tensors")  # type: ignore[dict-item]
    refused(put(tmp_path / "e", {"a.weight": torch.ones(3)}, None, "other.pth"), "no patch embedding")
    unknown = {"patch_embed.proj.weight": torch.ones(4, 3, 16, 16), "cls_token": torch.ones(1, 1, 4)}
    refused(put(tmp_path / "f", unknown, None, "strange.pth"), "no known layout")


def test_unsupported_architectures(tmp_path: Path) -> None:
    """Patches and position tables must be square."""
    with pytest.raises(UnsupportedError, match="square patches"):
        in_memory(state() | {"patch_embed.proj.weight": torch.ones(64, 3, 16, 8)})
    config = SOURCES["dinov2"]
    changed = meta_named(hf_model(config).state_dict(), config) | {"pos_embed": torch.ones(1, 1 + 20, 64)}
    with pytest.raises(UnsupportedError, match="no square grid"):
        in_memory(changed)


@pytest.mark.parametrize("given", ["./nowhere", "nowhere.pth", "~/nowhere/at/all", Path("nowhere")], ids=str)
def test_no_such_path(given: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error is a FileNotFoundError with the absolute path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at '/") as caught:
        Backbone.from_pretrained(given)
    assert isinstance(caught.value, MissingFileError) and "nowhere" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no weights at '/"):
        Backbone.from_pretrained("vits16", weights=given)


def test_unknown_name() -> None:
    with pytest.raises(ModelNotFoundError, match=r"unknown model 'vits-16': did you mean 'vits16'") as caught:
        Backbone.from_pretrained("vits-16")
    assert isinstance(caught.value, ValueError) and "list_models()" in str(caught.value)


def test_error_classes_are_builtins_too() -> None:
    assert issubclass(CheckpointError, ValueError) and issubclass(MissingFileError, FileNotFoundError)
    assert issubclass(UnsupportedError, NotImplementedError) and issubclass(ModelNotFoundError, ValueError)


# Strict both ways

# Not every file has these: without one the model is another one, and its config says so.
OPTIONAL = {
    "mask_token": r"(embeddings\.)?mask_token",
    "num_registers": r"(embeddings\.)?(register_tokens|storage_tokens|reg_token)",
}
# By these a ViT and its layout are recognised, so that a file without one is refused, but not by that name.
MARKS = (
    r"(patch_embed\.proj|embeddings\.patch_embeddings(\.projection)?)\.weight"
    r"|.*pos(ition)?_embed(dings)?|encoder\.layer\.0\.(norm1|layernorm_before)\.weight|blocks\.0\.(ls1\.gamma|gamma_1)"
)


def small(key: str, layout: str, folder: Path) -> tuple[State, dict[str, Any]]:
    """The tensors and the config.json of one file."""
    model = hf_model(SOURCES[key])
    if layout == "hf":
        model.save_pretrained(folder)
        return load_file(folder / "model.safetensors"), model.config.to_dict()
    config = {"meta": {}, "timm": {"architecture": timm_name(key)}}[layout]
    return {"meta": meta_named, "timm": timm_named}[layout](model.state_dict(), SOURCES[key]), config


def broken(tensors: State, config: dict[str, Any]) -> str:
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        in_memory(tensors, config)
    assert "'a.file'" in str(caught.value)
    return str(caught.value)


every_file = pytest.mark.parametrize(("key", "layout"), [(k, lay) for k in SOURCES for lay in ("hf", "meta", "timm")])


@every_file
def test_each_missing_tensor_is_named(layout: str, key: str, tmp_path: Path) -> None:
    """Without any one of its tensors a file is refused by that name, or is a model without that part."""
    tensors, config = small(key, layout, tmp_path)
    complete = in_memory(tensors, config).config
    faults = []
    for name in tensors:
        less = {n: t for n, t in tensors.items() if n != name}
        part = next((p for p, pattern in OPTIONAL.items() if re.fullmatch(pattern, name)), None)
        try:
            model = in_memory(less, config)
        except (CheckpointError, UnsupportedError) as error:
            if not (name in str(error) and "'a.file'" in str(error)) and part is None and not re.fullmatch(MARKS, name):
                faults.append(f"{name}: {error}")
        else:
            if part is None or getattr(model.config, part) == getattr(complete, part):
                faults.append(f"{name}: loaded without it")
    assert not faults, "\n".join(faults)


@every_file
def test_each_tensor_too_many_is_named(layout: str, key: str, tmp_path: Path) -> None:
    """An unknown tensor is refused by name, outside and inside the blocks."""
    tensors, config = small(key, layout, tmp_path)
    block = next(n for n in tensors if re.search(r"\.(norm1|layernorm_before)\.weight$", n))
    for name in ("something.weight", block.replace("weight", "running_mean")):
        assert name in broken(tensors | {name: torch.ones(64)}, config), name


@every_file
def test_each_wrong_shape_is_refused(layout: str, key: str, tmp_path: Path) -> None:
    """Any tensor of another shape is refused, even one that broadcasting would accept."""
    tensors, config = small(key, layout, tmp_path)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "longer": lambda t: torch.cat((t, t[:1])),
        "wider": lambda t: torch.cat((t, t.narrow(-1, 0, 1)), dim=-1),
        "single": lambda t: t.flatten()[:1].view([1] * t.ndim),
        "shorter": lambda t: t[:-1],
        "flat": lambda t: t.flatten(),
    }
    faults = []
    for name, how in product(tensors, changes):
        changed = changes[how](tensors[name])
        if (
            changed.shape == tensors[name].shape
            or not changed.numel()
            or (how, name) == ("single", "rope_embed.periods")
        ):
            continue  # a single period is a model with heads of width 4
        try:
            in_memory(tensors | {name: changed}, config)
        except Exception as error:
            if not isinstance(error, (CheckpointError, UnsupportedError)) or "'a.file'" not in str(error):
                faults.append(f"{name} {list(changed.shape)}: {error!r}")
        else:
            faults.append(f"{name} {list(changed.shape)}: loaded")
    assert not faults, "\n".join(faults)


def test_wrapped_file_is_strict_too() -> None:
    """The checks hold under a prefix too."""
    tensors = wrapped(state(), "teacher.backbone.")
    with pytest.raises(CheckpointError, match=r"1 left over: blocks\.0\.extra"):
        in_memory(tensors | {"teacher.backbone.blocks.0.extra": torch.ones(3)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_header_whose_length_looks_like_a_pickle(protocol: int, tmp_path: Path) -> None:
    """A safetensors file with a header of 640 bytes begins with the two bytes of a pickle."""
    length, state_dict = 0x80 + 256 * protocol, {"x": torch.ones(2)}
    for filling in range(length):
        save_file(state_dict, tmp_path / "a.safetensors", {"filling": " " * filling})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == bytes((0x80, protocol)):
            break
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content[0] == 0x80 and kind_of(content[:64], len(content), "a") == "safetensors"


def test_the_folder_of_a_training_run_is_its_backbone(tmp_path: Path) -> None:
    """Whatever else lies in it; a run without a result is no checkpoint."""
    model = Backbone.from_config("nano", seed=0)
    model.save_pretrained(tmp_path / "run" / "backbone")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "run" / "00000002").mkdir()
    loaded = Backbone.from_pretrained(tmp_path / "run", device="cpu")
    assert loaded.fingerprint() == model.fingerprint() and loaded.preprocess == model.preprocess
    (tmp_path / "early" / "backbone").mkdir(parents=True)
    assert "backbone'" in complaint(CheckpointError, lambda: Backbone.from_pretrained(tmp_path / "early"))
