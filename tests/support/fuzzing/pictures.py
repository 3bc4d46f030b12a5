"""Damaged and hostile images: valid files of each format, split, changed and joined again."""

import base64
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

ODD = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
SIDES = (0, 1, 2, 9, 64, 300, 5000, 9459, 9460, 16383, 20000, 65500, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
         *(b"P%d" % n for n in range(1, 7)), b"\xff\x4f\xff\x51")  # fmt: skip

Block = list[Any]  # [name, content]


def has_magic(content: bytes) -> bool:
    return content.startswith(MAGIC) or content[8:12] == b"WEBP" or content[4:12] == b"ftypavif"


@cache
def wholes() -> dict[str, list[bytes]]:
    """Small images of every supported format and mode, and some unsupported ones."""
    y, x = np.mgrid[:13, :18]
    rgb = Image.fromarray(np.stack((x * 14, y * 19, (x * y) % 256), -1).astype(np.uint8))
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    exif = rgb.getexif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    deep = Image.fromarray((x * 3000).astype(np.uint16))

    def saved(picture: Image.Image, form: str, frames: bool = False, **options: Any) -> bytes:
        stream = io.BytesIO()
        fresh = [Image.fromarray(np.asarray(p)) for p in (rgb.rotate(90), rgb.transpose(1))]
        picture.copy().save(stream, form, **({"save_all": True, "append_images": fresh} if frames else {}), **options)
        return stream.getvalue()

    profile = struct.pack(">I4s", 132, b"lcms").ljust(132, b"\0")
    found = {
        "PNG": [saved(rgb, "PNG", exif=exif, icc_profile=profile), saved(rgba, "PNG"), saved(deep, "PNG"),
                saved(rgb.quantize(9), "PNG", transparency=b"\x00\x80"), saved(rgb.convert("1"), "PNG"),
                saved(rgb, "PNG", frames=True), saved(rgb.convert("LA"), "PNG")],
        "JPEG": [saved(rgb, "JPEG", exif=exif, icc_profile=profile), saved(rgb, "JPEG", progressive=True),
                 saved(rgb.convert("L"), "JPEG"), saved(rgb.convert("CMYK"), "JPEG"), saved(rgb, "MPO", frames=True)],
        "GIF": [saved(rgb.convert("P"), "GIF"), saved(rgb, "GIF", frames=True), saved(rgba.convert("P"), "GIF")],
        "WEBP": [saved(rgb, "WEBP", exif=exif), saved(rgba, "WEBP", lossless=True), saved(rgb, "WEBP", frames=True)],
        "BMP": [saved(rgb, "BMP"), saved(rgb.quantize(9), "BMP"), saved(rgb.convert("1"), "BMP")],
        "TIFF": [saved(rgb, "TIFF"), saved(rgba, "TIFF", compression="tiff_lzw"), saved(rgb, "TIFF", frames=True),
                 saved(rgb, "TIFF", compression="tiff_adobe_deflate"), saved(rgb, "TIFF", compression="jpeg"),
                 saved(deep, "TIFF"), saved(rgb.convert("1"), "TIFF", compression="group4")],
        "PPM": [saved(rgb, "PPM"), saved(rgb.convert("L"), "PPM"), b"P3 2 1 9\n1 2 3 4 5 6\n", b"P1 3 1 1 0 1\n"],
        "others": [saved(rgb, form) for form in ("TGA", "ICO", "PCX", "DDS", "EPS", "SGI")],
    }  # fmt: skip
    if features.check("jpg_2000"):
        found["JPEG2000"] = [saved(rgb, "JPEG2000"), saved(rgba, "JPEG2000", no_jp2=True)]
    if features.check("avif"):
        found["AVIF"] = [saved(rgb, "AVIF", speed=10), saved(rgba, "AVIF", speed=10)]
    return found


def integer(draw: random.Random, size: int, order: str) -> bytes:
    value = draw.choice((*ODD, *SIDES, draw.getrandbits(8 * size)))
    return (value % 256**size).to_bytes(size, order)  # type: ignore[arg-type]


def change(draw: random.Random, content: bytes, order: str = "big") -> bytes:
    """A change that ignores the structure, except for numbers."""
    if not content:
        return draw.randbytes(draw.choice((1, 4, 99)))
    at, size = draw.randrange(len(content)), draw.choice((1, 1, 2, 4))
    at -= at % size
    kind = draw.randrange(6)
    if kind < 3:
        return content[:at] + integer(draw, size, order) + content[at + size :]
    if kind == 3:
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 4:
        return content[:at]
    end = min(len(content), at + draw.choice((1, 4, 64)))
    return content[:end] + content[at:end] * draw.choice((1, 2, 500)) + content[end:]


def tlv(content: bytes, start: int, form: str, *, little: bool = False, padded: bool = False) -> list[Block]:
    """Splits chunks of `length name` or `name length` (see `form`) from `start` on; the rest is the last chunk."""
    blocks: list[Block] = [[b"", content[:start]]]
    while start + 8 <= len(content):
        first, second = content[start : start + 4], content[start + 4 : start + 8]
        name, size = (first, second) if form == "name length" else (second, first)
        length = int.from_bytes(size, "little" if little else "big")
        blocks.append([name, content[start + 8 : start + 8 + length]])
        start += 8 + length + (4 if form == "length name crc" else 0) + (length % 2 if padded else 0)
    return blocks


def png(blocks: list[Block], lie: Callable[[int], int]) -> bytes:
    parts = [blocks[0][1]]
    for name, content in blocks[1:]:
        parts += [struct.pack(">I", lie(len(content))), name, content, struct.pack(">I", zlib.crc32(name + content))]
    return b"".join(parts)


def riff(blocks: list[Block], lie: Callable[[int], int]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", lie(len(content))) + content + b"\0" * (len(content) % 2)
        for name, content in blocks[1:]
    )
    return b"RIFF" + struct.pack("<I", lie(len(body) + 4)) + b"WEBP" + body


def boxes(blocks: list[Block], lie: Callable[[int], int]) -> bytes:
    return b"".join(struct.pack(">I", lie(len(content) + 8)) + name + content for name, content in blocks[1:])


def split_boxes(content: bytes) -> list[Block]:
    blocks: list[Block] = [[b"", b""]]
    while len(content) >= 8:
        length = int.from_bytes(content[:4], "big") or len(content)
        blocks.append([content[4:8], content[8 : max(8, length)]])
        content = content[max(8, length) :]
    return blocks


def split_jpeg(content: bytes) -> list[Block]:
    blocks: list[Block] = [[b"", content[:2]]]
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        length = int.from_bytes(content[at + 2 : at + 4], "big")
        blocks.append([content[at : at + 2], content[at + 4 : at + 2 + length]])
        at += 2 + length
    return [*blocks, [b"", content[at:]]]


def jpeg(blocks: list[Block], lie: Callable[[int], int]) -> bytes:
    return b"".join(n + (struct.pack(">H", lie(len(c) + 2) % 65536) if n else b"") + c for n, c in blocks)


CHUNKED: dict[str, tuple[Callable[[bytes], list[Block]], Callable[[list[Block], Callable[[int], int]], bytes]]] = {
    "PNG": (lambda c: tlv(c, 8, "length name crc"), png),
    "WEBP": (lambda c: tlv(c, 12, "name length", little=True, padded=True), riff),
    "JPEG": (split_jpeg, jpeg),
    "JPEG2000": (split_boxes, boxes),
    "AVIF": (split_boxes, boxes),
}
# Where width and height lie: offset in the file, or in a chunk of that name; size of each, byte order.
SIZES: dict[str, list[tuple[bytes, int, int, str]]] = {
    "PNG": [(b"IHDR", 0, 4, "big")], "GIF": [(b"", 6, 2, "little")], "BMP": [(b"", 18, 4, "little")],
    "WEBP": [(b"VP8X", 4, 3, "little"), (b"VP8 ", 6, 2, "little"), (b"VP8L", 1, 2, "little")],
    "JPEG": [(b"\xff\xc0", 1, 2, "big"), (b"\xff\xc2", 1, 2, "big")],
}  # fmt: skip
ZIPPED = zlib.compress(bytes(2**22), 9)
EXTRA: dict[str, list[Block]] = {
    "PNG": [[b"iCCP", b"x\0\0" + ZIPPED], [b"zTXt", b"x\0\0" + ZIPPED], [b"tRNS", b"\0" * 6], [b"eXIf", b"MM\0*\0"],
            [b"acTL", b"\0\0\0\x09\0\0\0\0"], [b"fcTL", bytes(26)], [b"PLTE", b"abc" * 300], [b"gAMA", b""]],
    "JPEG": [[b"\xff\xe1", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\xff\0\0"], [b"\xff\xdd", b"\0\1"],
             [b"\xff\xe2", b"MPF\0II*\0\x08\0\0\0"], [b"\xff\xe2", b"ICC_PROFILE\0\1\2"], [b"\xff\xc4", b"\0" * 17]],
    "WEBP": [[b"ANIM", bytes(6)], [b"ANMF", bytes(16)], [b"ALPH", b"\1"], [b"ICCP", b"x"], [b"EXIF", b"II*\0"]],
}  # fmt: skip


def set_size(draw: random.Random, content: bytes, at: int, size: int, order: Any) -> bytes:
    sides = [(draw.choice(SIDES) % 256**size).to_bytes(size, order) for _ in range(2)]
    return content[:at] + b"".join(sides) + content[at + 2 * size :]


def rearrange(draw: random.Random, form: str, content: bytes) -> bytes:
    """Changes, drops, doubles, moves or adds chunks; lengths and checksums are corrected, or one length lies."""
    split, join = CHUNKED[form]
    blocks = split(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        i = draw.randrange(1, len(blocks)) if len(blocks) > 1 else 0
        kind = draw.randrange(8)
        if kind < 3:
            blocks[i][1] = change(draw, blocks[i][1])
        elif kind == 3 and len(blocks) > 2:
            del blocks[i]
        elif kind == 4:
            blocks[i:i] = [list(blocks[i])] * draw.choice((1, 2, 300))
        elif kind == 5 and form in EXTRA:
            blocks.insert(i, list(draw.choice(EXTRA[form])))
        elif kind == 6:
            blocks.insert(i, blocks.pop())
        else:
            for name, at, size, order in SIZES.get(form, []):
                for block in blocks:
                    if block[0] == name:
                        block[1] = set_size(draw, block[1], at, size, order)
    liar = draw.randrange(40)
    counter = iter(range(10**6))
    return join(blocks, lambda length: draw.choice(ODD) % 2**32 if next(counter) == liar else length % 2**32)


def tiff_fields(content: bytes) -> list[tuple[int, int]]:
    """Offset and size of type, count and value of each entry in the first directory."""
    order = "little" if content[:2] == b"II" else "big"
    at = int.from_bytes(content[4:8], order)  # type: ignore[arg-type]
    count = int.from_bytes(content[at : at + 2], order)  # type: ignore[arg-type]
    entries = [at + 2 + 12 * i for i in range(count)]
    fields = [(e + o, s) for e in entries for o, s in ((2, 2), (4, 4), (8, 4), (8, 2))]
    return [(4, 4), *fields, (at + 2 + 12 * count, 4)]


def picture(draw: random.Random) -> bytes:
    """One damaged file."""
    form = draw.choice(list(wholes()))
    content = draw.choice(wholes()[form])
    if draw.random() < 0.06:  # nothing of it is right
        return draw.choice((b"", draw.randbytes(draw.randrange(64)), b"<html>" + content, content[draw.randrange(9) :]))
    if form in CHUNKED and draw.random() < 0.75 and not content.startswith(b"\xff\x4f"):
        content = rearrange(draw, form, content)
    elif form == "TIFF" and draw.random() < 0.75:
        order = "little" if content[:2] == b"II" else "big"
        for _ in range(draw.choice((1, 1, 2, 3))):
            at, size = draw.choice(tiff_fields(content))
            content = content[:at] + integer(draw, size, order) + content[at + size :]
    elif form == "PPM" and draw.random() < 0.75:
        header = [b"P%d" % draw.randrange(1, 8), *(b"%d" % draw.choice(SIDES) for _ in range(3))]
        content = draw.choice((b" ", b"\n", b"#x\n")).join(header[: draw.randrange(1, 5)]) + b"\n" + content[12:]
    elif form in SIZES and draw.random() < 0.3:
        _, at, size, order = SIZES[form][0]
        content = set_size(draw, content, at, size, order)
    else:
        for _ in range(draw.choice((1, 2, 5))):
            content = change(draw, content, draw.choice(("big", "little")))
    return content[: draw.randrange(len(content) + 1)] if draw.random() < 0.1 else content


def _closed(the_picture: bool) -> Image.Image:
    """An image that was closed after only its header was read, or whose stream was closed."""
    stream = io.BytesIO()
    Image.new("RGB", (5, 4)).save(stream, "PNG")
    picture = Image.open(stream)
    (picture if the_picture else stream).close()
    return picture


def live(draw: random.Random) -> Any:
    """An array, tensor, image or another object instead of a file."""
    import torch

    shape = [draw.choice((0, 1, 3, 3, 4, 9)) for _ in range(draw.choice((1, 2, 3, 3, 3, 4)))]
    dtype = draw.choice((np.uint8, np.uint8, np.float32, np.float64, np.int32, bool, np.uint16, object))
    array = (np.ones(shape) * draw.choice((0.5, 1, 0, -1, 200, np.nan, np.inf))).clip(
        0 if dtype == np.uint8 else -np.inf
    )
    with np.errstate(all="ignore"):
        array = array.astype(dtype)
    kind = draw.randrange(5)
    if kind == 0:
        odd = (None, 3, object(), {"image": 1}, [b"x"], (1, 2), bytearray(b"GIF89a"), io.StringIO("text"))
        return draw.choice((*odd, _closed(the_picture=True), _closed(the_picture=False)))
    if kind == 1:
        modes = ("RGB", "RGBA", "I", "F", "I;16", "La", "PA", "CMYK", "P", "1")
        return Image.new(draw.choice(modes), (draw.randrange(4), draw.randrange(4)))
    if kind < 4 and dtype not in (object, np.uint16):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(torch.complex64) if draw.random() < 0.1 else tensor
    return array


NAMES = (
    "picture.jpg",
    "no suffix",
    "new\nline.png",
    "caf\u00e9.png",
    os.fsdecode(b"\xff\xfe.gif"),
    "a'b\"c.webp",
    "?.[x]",
)


def case(draw: random.Random, folder: Path) -> tuple[Any, bool]:
    """An argument of `load_image`, and whether its first bytes look like an image."""
    kind = draw.random()
    if kind < 0.06:
        return live(draw), False
    content = picture(draw)
    magic = has_magic(content)
    if kind < 0.5:
        return content, magic
    if kind < 0.55:
        return io.BytesIO(content), magic
    if kind < 0.58:
        return "data:image/x;base64," + base64.b64encode(content).decode() + "=" * draw.randrange(2), magic
    path = folder / draw.choice(NAMES)
    path.write_bytes(content)
    return draw.choice((path, str(path), path.as_uri() if path.name.isascii() else path)), magic
