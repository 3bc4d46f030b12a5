"""Files that are no images of ours: what they are instead, and which plugin reads them."""

import importlib
import re

from PIL import Image, UnidentifiedImageError

__all__ = ["plugged", "unreadable", "what_it_is"]

# Formats of plugins: how a file begins, the module, and the function in it that registers it (importing does without).
_PLUGINS = {
    "HEIF": (re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL), "pillow_heif", "register_heif_opener"),
    "JXL": (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"), "pillow_jxl", None),
}
_PACKAGES = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}

# How a file begins, what it is then, and what to do.
_OTHERS = (
    (rb"PK\x03\x04|PK\x05\x06", "is a zip archive", "unpack it, and give the folder"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "is compressed", "decompress it; a .tar is read as it is"),
    (rb"Rar!|7z\xbc\xaf", "is an archive", "unpack it, and give the folder"),
    (rb".{257}ustar", "is a tar archive", "give it a name that ends in .tar"),
    (rb"PAR1", "is a Parquet table", "give it a name that ends in .parquet"),
    (rb"\x93NUMPY", "is an array of numpy", "load it, and give the array"),
    (rb"\x89HDF\r\n|CDF[\x01\x02]", "is an HDF5 or NetCDF file", "read the arrays in it, and give those"),
    (rb".{128}DICM", "is a DICOM file", "read its pixels (pydicom), and give the array with levels=(low, high)"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "is PostScript, a program that draws,", "convert it to PNG or JPEG"),
    (rb"%PDF", "is a PDF", "make an image of each page"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "is a drawing (SVG)", "make an image of it"),
    (rb"\s*<(!doctype|html|\?xml)", "is a page, as a server sends it in place of a file", "download it again"),
    (rb"version https://git-lfs", "is a Git LFS pointer", "git lfs pull brings the file that it points to"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "is a video", "give its frames"),
)
_UNREADABLE = re.compile(
    r"unsupported|not (supported|configured|implemented|available)|unknown|unrecogni[sz]ed|cannot handle|"
    r"samples per pixel",
    re.IGNORECASE,
)


def plugged(prefix: bytes) -> str | None:
    """The format of a file that a plugin reads, which is registered now where it is installed; None for others.

    Raises: UnidentifiedImageError that names the plugin.
    """
    for name, (begins, module, register) in _PLUGINS.items():
        if not begins.match(prefix):
            continue
        if name not in Image.OPEN:
            try:
                found = importlib.import_module(module)
            except ImportError:
                raise UnidentifiedImageError(
                    f"is a {name} image; pip install {_PACKAGES[module]}, which is then used by itself"
                ) from None
            if register is not None:
                getattr(found, register)()
        return name
    return None


def what_it_is(prefix: bytes) -> str:
    """What a file is that is no image, as the rest of a sentence that begins with its name."""
    for begins, what, remedy in _OTHERS:
        if re.match(begins, prefix, re.DOTALL | re.IGNORECASE):
            return f"{what} and no image; {remedy}"
    if prefix and not re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", prefix) and re.search(rb"[\n ,;/]", prefix):
        return "is a text and no image; a list of paths has a name that ends in .txt"
    return "is not a picture that Pillow can read safely; convert it to PNG or JPEG"


def unreadable(error: Exception) -> bool:
    """Whether Pillow says that it does not know the kind of a file, which need not be damaged then."""
    return isinstance(error, NotImplementedError) or bool(_UNREADABLE.search(str(error)))
