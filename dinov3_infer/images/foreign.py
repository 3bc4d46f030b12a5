"""Files that are no supported images: what they are, and which plugin reads them."""

import importlib
import re

from PIL import Image, UnidentifiedImageError

__all__ = ["plugged", "unreadable", "what_it_is"]

# Plugin formats: signature, module, and the function that registers the plugin (None: importing registers it).
_PLUGINS = {
    "HEIF": (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", "pillow_heif", "register_heif_opener"),
    "JXL": (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "pillow_jxl", None),
}
_PACKAGES = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}

# Signature, what the file is, and what to do.
_OTHERS = (
    (rb"PK\x03\x04|PK\x05\x06", "is a zip archive", "unpack it, and give the folder"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "is a compressed file", "decompress it; a .tar can be given directly"),
    (rb"Rar!|7z\xbc\xaf", "is an archive", "unpack it, and give the folder"),
    (rb".{257}ustar", "is a tar archive", "give it a name that ends in .tar"),
    (rb"PAR1", "is a Parquet table", "give it a name that ends in .parquet"),
    (rb"\x93NUMPY", "is a numpy array", "load it, and give the array"),
    (rb"\x89HDF\r\n|CDF[\x01\x02]", "is an HDF5 or NetCDF file", "read the arrays in it, and give those"),
    (rb".{128}DICM", "is a DICOM file", "read its pixels (pydicom), and give the array with levels=(low, high)"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "is a PostScript program", "convert it to PNG or JPEG"),
    (rb"%PDF", "is a PDF", "make an image of each page"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "is a drawing (SVG)", "make an image of it"),
    (rb"\s*<(!doctype|html|\?xml)", "is a web page, which servers send in place of a file", "download it again"),
    (rb"version https://git-lfs", "is a Git LFS pointer", "run git lfs pull to get the file"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "is a video", "give its frames"),
)
_UNREADABLE = (
    r"unsupported|not (supported|configured|implemented|available)|unknown|unrecogni[sz]ed|cannot handle|"
    r"samples per pixel"
)


def plugged(prefix: bytes) -> str | None:
    """Format of a file that a plugin reads, after registering the plugin; None for other files.

    Raises:
        UnidentifiedImageError: The plugin is not installed; the message names it.
    """
    for name, (begins, module, register) in _PLUGINS.items():
        if not re.match(begins, prefix, re.DOTALL):
            continue
        if name not in Image.OPEN:
            try:
                found = importlib.import_module(module)
            except ImportError:
                raise UnidentifiedImageError(
                    f"is a {name} image; pip install {_PACKAGES[module]}, which is then used automatically"
                ) from None
            if register is not None:
                getattr(found, register)()
        return name
    return None


def what_it_is(prefix: bytes) -> str:
    """What a file is instead of an image, as the rest of a sentence that begins with its name."""
    for begins, what, remedy in _OTHERS:
        if re.match(begins, prefix, re.DOTALL | re.IGNORECASE):
            return f"{what}, not an image; {remedy}"
    if prefix and not re.search(rb"[^\t\n\r\x20-\x7e\x80-\xff]", prefix) and re.search(rb"[\n ,;/]", prefix):
        return "is a text file, not an image; iter_features and embed read a list of paths from a file named .txt"
    return "is not an image that Pillow can read safely; convert it to PNG or JPEG"


def unreadable(error: Exception) -> bool:
    """Whether Pillow reports an unsupported format, so that the file need not be damaged."""
    return isinstance(error, NotImplementedError) or bool(re.search(_UNREADABLE, str(error), re.IGNORECASE))
