"""`dinov3-infer classify`: the likeliest classes of ImageNet, or of labels that are given, for each image."""

import argparse
from collections.abc import Callable

from ..errors import Dinov3Error
from ..images.decode import ImageLike
from ..images.opening import find_images
from ..released.imagenet import Guess
from .inputs import given_labels, load_released, status
from .main import say, tell

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    images = find_images(args.sources)
    predict = _predictor(args)
    skipped = 0
    for number in range(len(images)):
        name = images.key(number) or images.label(number)
        try:
            (guesses,) = predict(images.image(number))
        except Dinov3Error as error:  # of one image among many
            skipped += 1
            tell(f"left out {name}: {error}")
            continue
        for guess in guesses:
            say(f"{name}  {guess.probability:.4f}  {guess.label}  {guess.name}")
    return status(len(images), skipped)


def _predictor(args: argparse.Namespace) -> Callable[[ImageLike], list[list[Guess]]]:
    if args.labels is None:
        classifier = load_released(args, "classifier")
        return lambda image: classifier.predict(image, args.top)
    head = load_released(args, "text")
    labels = head.encode_labels(given_labels(args), args.template)
    return lambda image: head.classify(image, labels, top=args.top)
