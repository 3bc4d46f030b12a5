"""`dinov3-infer embed dedup`: lists the images that remain without near-duplicates."""

import argparse

import numpy as np
import torch

from ..errors import InputError
from ..features.disk.lists import write_list
from ..features.disk.store import Store
from ..tasks.neighbours import duplicates
from .inputs import check_file
from .main import OK, say, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Writes the list of kept images and prints the others; returns the exit status.

    Raises:
        InputError: an option does not fit, or the vectors cannot be compared.
    """
    if args.against is None and args.against_threshold is not None:
        raise InputError("--against-threshold needs --against; add --against, or remove --against-threshold")
    out = check_file(args.out, args.overwrite, (".txt",))
    store = Store(args.vectors)
    against = None if args.against is None else Store(args.against)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = duplicates(store, args.threshold, against, args.against_threshold, not args.plain, device)
    kept = found.kept(store)
    alike = np.flatnonzero(store.good & (found.group != np.arange(len(store))) & ~found.foreign)
    foreign = np.flatnonzero(store.good & found.foreign)
    for number in alike:
        say(store.paths[int(number)], store.paths[int(found.group[number])])
    for number in foreign:
        say(store.paths[int(number)], args.against)
    write_list(out, (store.paths[int(number)] for number in kept))
    parts = [f"duplicates: {len(alike)}"]
    if against is not None:
        parts.append(f"duplicates of '{args.against}': {len(foreign)}")
    if failed := int((~store.good).sum()):
        parts.append(f"without a vector: {failed}")
    tell(f"wrote '{out}': kept {len(kept)} of {len(store)} images; {', '.join(parts)}")
    return OK
