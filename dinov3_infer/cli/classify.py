"""`dinov3-infer classify`: the likeliest classes of ImageNet for each image."""

import argparse

from ..errors import Dinov3Error, InputError
from ..images.opening import find_images
from ..released.attach import load_head
from ..released.catalogue import find_head
from .inputs import status
from .main import say, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    images = find_images(args.sources)
    if (kind := find_head(args.head).kind) != "classifier":
        raise InputError(f"{args.head} is of another kind, {kind}; give a name that ends in _lc")
    classifier = load_head(args.head, weights=args.weights, variant=args.layers, device=args.device)
    skipped = 0
    for number in range(len(images)):
        name = images.key(number) or images.label(number)
        try:
            (guesses,) = classifier.predict(images.picture(number), args.top)
        except Dinov3Error as error:  # of one image among many
            skipped += 1
            tell(f"left out {name}: {error}")
            continue
        for guess in guesses:
            say(f"{name}  {guess.probability:.4f}  {guess.label}  {guess.name}")
    return status(len(images), skipped)
