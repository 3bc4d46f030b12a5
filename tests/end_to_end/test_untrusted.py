"""Hostile files and names: each limit, and what is accepted below it."""

import io
import json
import os
import stat
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import SOURCES, State, in_memory, load, meta_named, put, small_models_are_known as small_models_are_known
from oracles import hf_model
from pictures import complaint, photo, plain
from PIL import Image

from dinov3_infer import Backbone, CheckpointError, Dinov3Error
from dinov3_infer.checkpoints.reading import MAX_JSON, open_checkpoint
from dinov3_infer.checkpoints.recognise import normalise
from dinov3_infer.errors import ImageError, InputError, InputTypeError, MissingFileError
from dinov3_infer.images import decode as images
from dinov3_infer.images.decode import decode, load_image

STATE = meta_named(hf_model(SOURCES["dinov3"]).state_dict(), SOURCES["dinov3"])


def encoded(picture: Image.Image, form: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a\nb\t\x1b[2J", r"a\nb\t\x1b[2J"), (os.fsdecode(b"caf\xe9"), r"caf\udce9"), ("\u202egnp", r"\u202egnp"),
     ("caf\u00e9 \u732b \U0001f431", "caf\u00e9 \u732b \U0001f431")],
    ids=["newline", "not_utf8", "right_to_left", "letters"],
)  # fmt: skip
def test_names_are_shown_on_one_line(given: str, shown: str, tmp_path: Path) -> None:
    """Control characters and unprintable characters are escaped; letters of all languages stay."""
    text = complaint(MissingFileError, lambda: load_image(f"/nowhere/{given}.png"))
    assert f"/nowhere/{shown}.png" in text
    text.encode("utf-8")
    assert Dinov3Error(given).args == (given,) and pytest.raises(FileNotFoundError, load_image, f"/nowhere/{given}")


def test_long_messages_keep_both_ends() -> None:
    """A name of a megabyte in a file does not give a message of a megabyte."""
    with pytest.raises(CheckpointError, match=r"^'a\.file' does not fit.*xx \.\.\. xx.*the end$") as caught:
        in_memory(STATE | {"x" * 1_000_000 + "the end": torch.ones(1)})
    assert len(str(caught.value)) < 2100


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_pixels_are_limited_by_what_their_decoder_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is 12 bytes of decoder memory per pixel of Pillow's MAX_IMAGE_PIXELS, which users can change."""
    picture = Image.fromarray(photo(30, 30))
    contents = [
        (525, encoded(picture)), (750, encoded(picture, "jpeg", progressive=True)), (900, encoded(picture, "gif")),
        (900, encoded(picture.convert("CMYK"), "jpeg")), (1800, encoded(picture, "webp", lossless=True)),
    ]  # fmt: skip
    for limit in (524, 525, 749, 750, 899, 900, 1799, 1800, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for needed, content in contents:
            if limit is None or limit >= needed:
                assert load_image(content).shape == (3, 30, 30)
            else:
                assert "MAX_IMAGE_PIXELS" in complaint(ImageError, lambda content=content: load_image(content))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pixels_are_limited_before_a_decoder_makes_them_fewer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG that would be decoded at an eighth is not opened either, because its header is not trusted."""
    content = encoded(Image.fromarray(photo(300, 400)), form)
    assert decode(content, "it", lambda height, width: (40, 50)).image.shape == (
        (3, 75, 100) if form == "JPEG" else (3, 300, 400)
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 69_999)
    assert "MAX_IMAGE_PIXELS" in complaint(ImageError, lambda: decode(content, "it", lambda height, width: (40, 50)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_give_what_the_whole_gives(mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting a few rows at a time gives the same pixels, with and without transparency and rotation."""
    picture = Image.fromarray(photo(37, 50)).convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(photo(37, 50)[..., 0]))
    exif = picture.getexif()
    exif[0x0112] = orientation
    options = {"transparency": 3} if mode in "PL" else {}
    content = encoded(picture, "tiff" if mode == "CMYK" else "png", exif=exif, **options)
    whole = load_image(content)
    monkeypatch.setattr(images, "_STRIP", 120)
    assert torch.equal(load_image(content), whole) and whole.shape[1:] == ((50, 37) if orientation >= 5 else (37, 50))


def test_streams_without_an_end_are_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Endless streams are abandoned, large files are not opened, and an input at the limit is read."""
    content = encoded(Image.fromarray(photo(20, 30)))
    monkeypatch.setattr(images, "MAX_BYTES", len(content))
    assert load_image(io.BytesIO(content)).shape == (3, 20, 30)
    (tmp_path / "a.png").write_bytes(content)
    assert load_image(tmp_path / "a.png").shape == (3, 20, 30)
    (tmp_path / "a.png").write_bytes(content + b"\0")
    with open("/dev/zero", "rb") as endless:
        for source in (tmp_path / "a.png", io.BytesIO(content + b"\0"), endless):
            assert "is larger than" in complaint(ImageError, lambda source=source: load_image(source))
    assert "StringIO" not in complaint(InputTypeError, lambda: load_image(io.StringIO("text")))


class Slow(io.RawIOBase):
    """Returns a few bytes at a time, as a socket does."""

    def __init__(self, content: bytes) -> None:
        self.rest = content

    def read(self, size: int = -1) -> bytes:
        given, self.rest = self.rest[:7], self.rest[7:]
        return given


def test_a_stream_may_give_little_at_a_time() -> None:
    assert load_image(Slow(encoded(Image.fromarray(photo(20, 30))))).shape == (3, 20, 30)


def test_pipes_devices_and_loops_are_said(tmp_path: Path) -> None:
    """None of them is opened, because a pipe would block."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, source in (("pipe", tmp_path / "pipe"), ("zero", "/dev/zero")):
        assert name in complaint(ImageError, lambda source=source: load_image(source))
        assert "pipe or a device" in complaint(CheckpointError, lambda source=source: load(Path(source)))
    for source in (tmp_path / "loop", "./a\0b", "./" + "x" * 5000):
        complaint(MissingFileError, lambda source=source: load_image(source))
        complaint(MissingFileError, lambda source=source: load(Path(source)))
    complaint(MissingFileError, lambda: load(Path("~nobody_of_this_name/x")))


@pytest.mark.parametrize("form", ["eps", "tga", "ico", "pcx", "sgi", "dds"])
def test_formats_that_are_hardly_ever_tried_are_refused(form: str) -> None:
    """EPS would run another program; the other decoders are not needed."""
    content = encoded(Image.fromarray(photo(16, 16)), form)
    assert Image.open(io.BytesIO(content)).format.lower() == form
    assert "convert it to PNG or JPEG" in complaint(ImageError, lambda: load_image(content))


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [("a", "b", "c"), (1.0, 1.0), (float("nan"),) * 3, (10**400, 1, 1), (float("inf"), 0.5, 0.5), (None,) * 3]
)
def test_mean_and_std_are_three_numbers(wrong: Any) -> None:
    """Other values are refused, also from a preprocessor_config.json, and so is a standard deviation of 0 or below."""
    for change in ({"mean": wrong}, {"std": wrong}, {"std": (0.2, 0.0, 0.2)}, {"std": (-1.0, 1.0, 1.0)}):
        text = complaint(InputError, lambda change=change: replace(plain(16), **change))
        assert f"{next(iter(change))} is three numbers" in text


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [MAX_JSON + 1, 2**40], ids=["long", "longer_than_memory"])
def test_long_headers_are_not_read(head: int, tmp_path: Path) -> None:
    """A header that states a huge size is refused before it is read, alone and among shards."""
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(head.to_bytes(8, "little") + b'{"')
        file.truncate(head + 9)
    assert "header of" in complaint(CheckpointError, lambda: load(path))
    shards = hf_model(SOURCES["dinov3"])
    shards.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    first = next((tmp_path / "m").glob("model-00001*"))
    os.replace(path, first)
    assert first.name in complaint(CheckpointError, lambda: load(tmp_path / "m"))


def test_long_json_is_not_read(tmp_path: Path) -> None:
    hf_model(SOURCES["dinov3"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(" " * MAX_JSON + "{}")
    assert "config.json' is longer" in complaint(CheckpointError, lambda: load(tmp_path))


def saved(tensors: Any, path: Path, **options: Any) -> Path:
    torch.save(tensors, path, **options)
    return path


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_pickles_get_no_more_memory_than_they_have_bytes(new: bool, tmp_path: Path) -> None:
    """torch allows a call that makes a bytearray of any size, and a member may unpack to a thousand times its size."""
    path = saved(STATE | {"x": bytearray(9)}, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    assert "objects besides tensors" in complaint(CheckpointError, lambda: load(path))
    if new:
        with zipfile.ZipFile(saved(STATE, tmp_path / "b.pth")) as whole, zipfile.ZipFile(path, "w", 8) as packed:
            for member in whole.infolist():
                packed.writestr(member.filename, whole.read(member))
        assert "objects besides tensors" in complaint(CheckpointError, lambda: load(path))
        assert load(tmp_path / "b.pth").config.depth == 2


def test_nested_dictionaries_end(tmp_path: Path) -> None:
    """Loading ends for a dictionary that contains itself ten times, and for keys that are not strings."""
    loop: dict[Any, Any] = {3: torch.ones(2), (1, 2): None, "once": torch.ones(2)}
    loop |= {f"again{i}": loop for i in range(10)}
    path = saved({"teacher": STATE, "loop": loop}, tmp_path / "a.pth")
    assert load(path).config.depth == 2
    assert [name for name in open_checkpoint(path).tensors.shapes if "loop" in name] == ["loop.once"]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("cls_token", torch.ones(1, 1, 64, dtype=torch.int32)),
        ("cls_token", torch.ones(1).expand(1, 1, 64)),
        ("cls_token", torch.ones(1, 1, 64).to_sparse()),
        ("blocks.1.mlp.fc1.bias", torch.empty(128, device="meta")),
        ("blocks.0.attn.qkv.weight", torch.ones(192, 64, dtype=torch.uint8)),
    ],
    ids=["integers", "stretched", "sparse", "nowhere", "quantised"],
)
def test_weights_are_floating_point_numbers_in_the_file(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    """A tensor of the right shape that is not a stored float is named in the error, used or not."""
    shape = STATE[name].shape
    assert tensor.shape == shape or name.startswith("blocks.1")
    path = saved(STATE | {name: tensor}, tmp_path / "a.pth")
    assert f"1 not stored as floating point numbers: {name}" in complaint(CheckpointError, lambda: load(path))
    assert load(saved({"b": STATE, "other": tensor}, path)).config.depth == 2


def test_a_shape_may_not_claim_what_no_model_has(tmp_path: Path) -> None:
    """Sizes that would overflow, or build ten thousand blocks, are refused before tensors are compared."""
    stretched = {"cls_token": torch.ones(1).expand(1, 1, 2**60), "storage_tokens": torch.ones(1).expand(1, 2**50, 64)}
    for change in (*({n: t} for n, t in stretched.items()), {"blocks.9999.norm1.weight": torch.ones(64)}):
        path = saved(STATE | change, tmp_path / "a.pth")
        assert next(iter(change)) in complaint(CheckpointError, lambda path=path: load(path))


def test_thousands_of_backbones_take_no_time() -> None:
    """Names are grouped by prefix in linear time; one prefix may begin with another."""
    names = [f"m{i}.patch_embed.proj.weight" for i in range(30_000)]
    assert len(normalise(names)) == 30_000
    nested = ["patch_embed.proj.weight", "a.patch_embed.proj.weight", "a.cls", "ab.cls", "a\U0010ffff", "b.cls"]
    assert normalise(nested) == {
        "": {name: name for name in nested},
        "a.": {"patch_embed.proj.weight": "a.patch_embed.proj.weight", "cls": "a.cls"},
    }


@pytest.mark.parametrize(
    "fields",
    [{"model_type": []}, {"model_type": {}, "architecture": [3]}, {"num_attention_heads": [2]}, {"rope_theta": 10**300},
     {"layer_norm_eps": float("inf")}, {"hidden_act": ["gelu"]}, {"hidden_size": json.loads("[" * 400 + "]" * 400)},
     {"dinov3_infer": {"rope_periods": ["a"] * 4}}, {"dinov3_infer": {"rope_periods": [0.0] * 4, "name": {}}}],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_config_of_wrong_types(fields: dict[str, Any], tmp_path: Path) -> None:
    """The result is a model or a Dinov3Error."""
    hf_model(SOURCES["dinov3"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    try:
        assert load(tmp_path).config.depth == 2
    except Dinov3Error as error:
        assert str(tmp_path) in str(error)


# --- writing over what is there --------------------------------------------------------------------------------------


def test_a_hostile_index_deletes_nothing_else(tmp_path: Path) -> None:
    """Saving removes the shards of the old checkpoint, but not the new files, and no other file."""
    model = Backbone.from_config(SOURCES["dinov3"], seed=0)
    for listed in ("model.safetensors", "notes.txt", "..", "../outside.safetensors", "config.json"):
        folder = tmp_path / "m"
        folder.mkdir(exist_ok=True)
        for path in (folder / "notes.txt", tmp_path / "outside.safetensors"):
            path.write_text("mine")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": listed}}))
        model.save_pretrained(folder)
        assert load(folder).fingerprint() == model.fingerprint(), listed
        assert (folder / "notes.txt").exists() and (tmp_path / "outside.safetensors").exists(), listed
        assert not list(folder.glob("*.index.json"))


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_are_readable_by_whom_the_umask_lets(mask: int, tmp_path: Path) -> None:
    """Weights get the same permissions as the config beside them."""
    before = os.umask(mask)
    try:
        model = Backbone.from_config(SOURCES["dinov3"], seed=0)
        written = [path for path in model.save_pretrained(tmp_path / "m").rglob("*") if path.is_file()]
        written += [model.save_pretrained(tmp_path / f"m.{s}", layout="meta") for s in ("pth", "safetensors")]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~mask}


# --- another model than was asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_another_width_is_said_to_be_that(suffix: str, tmp_path: Path) -> None:
    """Meta's layout does not state the heads; those of the named model need not divide the width of the file."""
    path = put(tmp_path, STATE, None, f"own.{suffix}")
    with pytest.raises(
        CheckpointError, match=r"looks like small_dinov3\b.*you asked for dinov3_vits16 .*384"
    ) as caught:
        Backbone.from_pretrained("vits16", weights=path)
    assert "heads" not in str(caught.value)
    odd: State = {n: t[..., :60] if n == "cls_token" else t for n, t in STATE.items()}
    with pytest.raises(CheckpointError, match="embed_dim 60.*you asked for dinov3_vits16"):
        Backbone.from_pretrained("vits16", weights=put(tmp_path, odd, None, f"odd.{suffix}"))


def test_resizing_by_channel_gives_the_same_bits() -> None:
    """The float engine resizes one channel at a time, which needs a third of the memory."""
    image = torch.from_numpy(np.ascontiguousarray(photo(71, 97).transpose(2, 0, 1)))
    together = torch.nn.functional.interpolate(image[None] / 255.0, size=(32, 48), mode="bilinear", antialias=True)[0]
    assert torch.equal(plain((32, 48), engine="float").place(image)[0], together)
