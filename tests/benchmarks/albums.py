"""Albums for runs over many images: small images and photographs in many formats, some broken in twenty ways."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["BREAKAGES", "write_album"]


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _flipped(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(40):
        found[rng.randrange(8, 40)] ^= 1 << rng.randrange(8)
    return bytes(found)


_NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
PNG, JPEG = _saved(_NOISE, "PNG"), _saved(_NOISE, "JPEG")

# Replacements of an image: bytes; None for a dangling link; a string for a folder of that name.
BREAKAGES: dict[str, Callable[[random.Random], bytes | None | str]] = {
    "empty": lambda rng: b"",
    "one byte": lambda rng: b"\xff",
    "text": lambda rng: b"this is no picture\n",
    "web page": lambda rng: b"<!DOCTYPE html><html><body>404</body></html>",
    "json error": lambda rng: b'{"error": "quota exceeded"}',
    "zeros": lambda rng: bytes(4096),
    "noise": lambda rng: rng.randbytes(4096),
    "noise behind a PNG's first bytes": lambda rng: PNG[:8] + rng.randbytes(2000),
    "noise behind a JPEG's first bytes": lambda rng: JPEG[:4] + rng.randbytes(2000),
    "PNG cut in its header": lambda rng: PNG[:20],
    "PNG cut in its pixels": lambda rng: PNG[: len(PNG) // 2],
    "JPEG cut in its header": lambda rng: JPEG[:100],
    "JPEG cut in its pixels": lambda rng: JPEG[: len(JPEG) // 2],
    "PNG with bits flipped": lambda rng: _flipped(PNG, rng),
    "PNG without pixels": lambda rng: _png(_header(8, 8), (b"IEND", b"")),
    "PNG of size zero": lambda rng: _png(_header(0, 8), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "bomb": lambda rng: _png(_header(60_000, 60_000), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")),
    "16 bits": lambda rng: _saved(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"),
    "link to nowhere": lambda rng: None,
    "unknown format": lambda rng: b"FUNNY" + rng.randbytes(500),
}


def write_album(
    folder: Path,
    count: int,
    small: np.ndarray | None = None,  # uint8 [N, H, W, 3]; None for noise
    photographs: list[Image.Image] | None = None,
    share_broken: float = 0.01,
    seed: int = 0,
) -> list[Path]:
    """Writes `count` files: PNG and JPEG of small images; every 40th is a crop of a photograph in some mode and size;
    a share `share_broken` is broken, in each way equally often.
    """
    rng, draws = random.Random(seed), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    broken = rng.sample(range(count), round(share_broken * count))
    ways = dict(zip(broken, (list(BREAKAGES) * (1 + len(broken) // len(BREAKAGES)))[: len(broken)], strict=True))
    paths = []
    for i in range(count):
        path = folder / f"{i // 1000:03d}" / f"{i:06d}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        paths.append(path)
        if i in ways:
            content = BREAKAGES[ways[i]](rng)
            if content is None:
                path.symlink_to(folder / "nowhere.png")
            else:
                path.write_bytes(content)
            continue
        pixels = small[i % len(small)] if small is not None else draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        if photographs and i % 40 == 0:
            whole = photographs[rng.randrange(len(photographs))]
            image = whole.resize((rng.randrange(20, 700), rng.randrange(20, 700)))
            image = image.convert(rng.choice(["RGB", "L", "CMYK"] if path.suffix == ".jpg" else ["RGBA", "P", "1"]))
        image.save(path)
    return paths
