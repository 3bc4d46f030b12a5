"""Limits the work of a JPEG: its decoder visits all pixels once per scan, and a scan can take as few as ten bytes."""

from typing import BinaryIO

from PIL import Image

from ..errors import ImageError

__all__ = ["check_scans"]

MOST, MOST_WORK = 1000, 2**32  # scans; scans times pixels, 40 scans of the largest image (real files have up to 18)
_CHUNK = 1 << 20


def check_scans(image: Image.Image, stream: BinaryIO, label: str) -> None:
    """Refuse a JPEG, just opened, that would keep its decoder busy for minutes.

    Raises: ImageError.
    """
    if image.format not in ("JPEG", "MPO") or _has_one(image, stream):
        return
    most = min(MOST, MOST_WORK // max(1, image.width * image.height))
    if _holds_more(stream, most):
        raise ImageError(
            f"{label} is a JPEG with more than {most} scans of {image.width} x {image.height} pixels, which would take "
            "minutes to decode; save it again"
        )


def _has_one(image: Image.Image, stream: BinaryIO) -> bool:
    """Whether the first scan holds all colours and is not progressive, so that the decoder stops after it."""
    count = len(getattr(image, "layer", ()))
    size = 8 + 2 * count  # bytes of the header of such a scan, which Pillow has just read
    if image.info.get("progressive") or stream.tell() < size:
        return False
    stream.seek(-size, 1)
    return stream.read(5) == bytes((0xFF, 0xDA, 0, size - 2, count))


def _holds_more(stream: BinaryIO, most: int) -> bool:
    """Count scan markers, which occur elsewhere only in thumbnails: in pixel data a zero byte follows each 0xFF."""
    stream.seek(0)
    found, last = 0, b""
    while found <= most and (chunk := stream.read(_CHUNK)):
        found += (last + chunk).count(b"\xff\xda")
        last = chunk[-1:] if chunk[-1:] == b"\xff" else b""
    return found > most
