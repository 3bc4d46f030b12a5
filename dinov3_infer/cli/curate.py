"""`dinov3-infer embed curate`: chooses a balanced subset, or images similar to seed images."""

import argparse

import numpy as np
import torch

from ..errors import InputError
from ..features.disk.lists import listed_in, write_list
from ..features.disk.store import Store
from ..tasks.clusters import hierarchy, retrieve
from .inputs import check_file
from .main import OK, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Writes the list of chosen images; returns the exit status.  Raises: InputError for options that do not fit."""
    if args.seeds is None and args.count is None:
        raise InputError("no choice is given; add -n for a balanced subset, or --seeds for similar images")
    if args.seeds is None and args.nearest is not None:
        raise InputError("--nearest needs --seeds; add --seeds, or remove --nearest")
    if args.seeds is not None and args.clusters is not None:
        raise InputError("--clusters does not work with --seeds; remove one of them")
    out = check_file(args.out, args.overwrite, (".txt",))
    store = Store(args.vectors)
    within = None if args.within is None else listed_in(store, args.within)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.seeds is not None:
        numbers = retrieve(
            store, Store(args.seeds), args.nearest or 4, by_cluster=False if args.nearest else None, seed=args.seed,
            device=device,
        )  # fmt: skip
        numbers = numbers if within is None else numbers[within[numbers]]
        if args.count is not None and args.count < len(numbers):
            numbers = np.sort(np.random.default_rng(args.seed).choice(numbers, args.count, replace=False))
    else:
        levels = hierarchy(store, args.clusters, within, args.seed, device=device)
        numbers = levels.sample(args.count, args.seed)
    count = write_list(out, (store.paths[int(number)] for number in numbers))
    tell(f"wrote '{out}': {count} of {len(store)} images")
    return OK
