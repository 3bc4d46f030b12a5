"""Numbered pictures: in files, tar archives, Parquet tables, any Dataset, and what a list picks out of them.

Nothing is read until a picture is asked for by its number, so that a million cost no more than their names; what is
handed to other processes can be pickled.
"""

from .base import Files, Items, Names, Numbered, Source, folder_labels, joined, picture_suffixes
from .containers import Dataset, pyarrow
from .decoding import Loaded, Wanted, decode
from .opening import ARCHIVES, LISTS, open_names, open_pictures, open_source

__all__ = [
    "ARCHIVES",
    "LISTS",
    "Dataset",
    "Files",
    "Items",
    "Loaded",
    "Names",
    "Numbered",
    "Source",
    "Wanted",
    "decode",
    "folder_labels",
    "joined",
    "open_names",
    "open_pictures",
    "open_source",
    "picture_suffixes",
    "pyarrow",
]
