"""How much work a JPEG asks for: its decoder goes over all pixels once for each scan, and a scan may take ten bytes."""

from typing import BinaryIO

from PIL import Image

from ..errors import ImageError

__all__ = ["check_scans"]

MOST, MOST_WORK = 1000, 2**32  # scans; scans times pixels, 40 of the largest image: what people have has up to 18
_CHUNK = 1 << 20


def check_scans(picture: Image.Image, stream: BinaryIO, label: str) -> None:
    """Raises ImageError for a JPEG, just opened, that would keep its decoder busy for minutes."""
    if picture.format not in ("JPEG", "MPO") or _has_one(picture, stream):
        return
    most = min(MOST, MOST_WORK // max(1, picture.width * picture.height))
    if _holds_more(stream, most):
        raise ImageError(
            f"{label} is a JPEG of more than {most} scans, each of which goes over {picture.width} x {picture.height} "
            "pixels; save it anew"
        )


def _has_one(picture: Image.Image, stream: BinaryIO) -> bool:
    """Whether all colours are in the first scan and none is sent in parts: the decoder stops after it then."""
    count = len(getattr(picture, "layer", ()))
    size = 8 + 2 * count  # of the header of such a scan, which Pillow has just read
    if picture.info.get("progressive") or stream.tell() < size:
        return False
    stream.seek(-size, 1)
    return stream.read(5) == bytes((0xFF, 0xDA, 0, size - 2, count))


def _holds_more(stream: BinaryIO, most: int) -> bool:
    """A marker of a scan stands nowhere else but in a thumbnail: between pixels 0xFF has a zero behind it."""
    stream.seek(0)
    found, last = 0, b""
    while found <= most and (chunk := stream.read(_CHUNK)):
        found += (last + chunk).count(b"\xff\xda")
        last = chunk[-1:] if chunk[-1:] == b"\xff" else b""
    return found > most
