"""Commands and their options.  Nothing here imports torch: help and usage errors come at once."""

import argparse
import re

from .. import __version__

__all__ = ["make_parser"]

_EPILOG = """\
exit status: 0 done; 1 failed; 2 wrong usage; 3 done, but something was left out; 130 interrupted

dinov3-infer COMMAND --help shows the options of a command. SRC is a file, a folder (searched to the bottom), a
pattern, an address, or @LIST for a file with one of these per line (find -print0 is understood, @- is stdin)."""

_MODEL = "name, hub id, folder, weights file or link (nano)"
_FORMATS = ("hf", "meta", "timm")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    found = argparse.ArgumentParser(
        prog="dinov3-infer",
        description="Features from images with the DINO family of vision backbones.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = found.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, parents: tuple[argparse.ArgumentParser, ...] = ()) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        return commands.add_parser(
            name, help=text, description=description, parents=[*parents, _debug()], allow_abbrev=False
        )

    _embed(command("embed", "one vector per picture, in a .npy file", (_sources(), _model(), _batches())))
    _features(command("features", "dense feature maps, one file per picture", (_sources(), _model(), _batches())))
    _show(command("show", "a picture of what the features hold"))
    _models(command("models", "the models that can be named"))
    _convert(command("convert", "weights in the layout of another library"))
    command("doctor", "what this installation is and whether it works: for bug reports")
    _verify(command("verify", "whether weights are what they claim to be"))
    commands.add_parser("train", help="train a backbone on pictures without labels", add_help=False)
    return found


# --- what commands share -------------------------------------------------------------------------------------------


def _group() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False)


def _debug() -> argparse.ArgumentParser:
    found = _group()
    found.add_argument("--debug", action="store_true", help="log more, and show the traceback of an error")
    return found


def _sources() -> argparse.ArgumentParser:
    found = _group()
    found.add_argument("sources", nargs="+", metavar="SRC", help="picture, folder, pattern, address or @LIST")
    return found


def _model() -> argparse.ArgumentParser:
    found = _group()
    found.add_argument("-m", "--model", help=_MODEL)
    found.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (auto: cuda if there is one)")
    found.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: float32, mixed on CUDA)")
    return found


def _batches() -> argparse.ArgumentParser:
    found = _group()
    found.add_argument("-b", "--batch-size", type=_count, default=32, metavar="N", help="pictures per pass (32)")
    found.add_argument("-j", "--workers", type=int, metavar="N", help="threads that read pictures (0; CUDA: up to 8)")
    return found


def _geometry(found: argparse.ArgumentParser, dense: bool) -> None:
    default = "768 pixels" if dense else "that of the model"
    found.add_argument(
        "--size", type=_size, default=768 if dense else None, help=f"SIDE or HEIGHTxWIDTH in pixels, or own ({default})"
    )
    found.add_argument(
        "--fit", choices=("squash", "crop", "pad", "native"), default="native" if dense else None,
        help=f"how pictures become that size ({'native' if dense else 'that of the model'})",
    )  # fmt: skip


def _out(found: argparse.ArgumentParser, text: str, metavar: str) -> None:
    found.add_argument("-o", "--out", required=True, metavar=metavar, help=text)
    _overwrite(found)


def _overwrite(found: argparse.ArgumentParser) -> None:
    found.add_argument("--overwrite", action="store_true", help="replace what is there")


# --- the commands --------------------------------------------------------------------------------------------------


def _embed(found: argparse.ArgumentParser) -> None:
    _out(found, "array to write; beside it a .jsonl says which row is which picture", "OUT.npy")
    _geometry(found, dense=False)
    found.add_argument("--pooling", choices=("cls", "mean", "cls_mean"), default="cls", help="what the vector is (cls)")
    found.add_argument("--normalize", action="store_true", help="vectors of length 1")
    _on_error(found)


def _features(found: argparse.ArgumentParser) -> None:
    _out(found, "folder to write to; index.jsonl in it says which file is which picture", "DIR")
    _geometry(found, dense=True)
    found.add_argument("--layers", type=_numbers, metavar="N,N,...", help="blocks from 0, or from the end: -1,-4 (-1)")
    found.add_argument(
        "--format", choices=("safetensors", "npy"), default="safetensors", help="of the files (safetensors)"
    )
    found.add_argument("--half", action="store_true", help="store float16")
    _on_error(found)


def _on_error(found: argparse.ArgumentParser) -> None:
    found.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="at a bad picture (skip)")


def _show(found: argparse.ArgumentParser) -> None:
    kinds = found.add_subparsers(dest="kind", metavar="KIND", required=True)

    def kind(name: str, text: str) -> argparse.ArgumentParser:
        one = kinds.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[_sources(), _model(), _debug()],
            allow_abbrev=False,
        )  # fmt: skip
        _out(one, "picture to write: .png, .jpg or .webp", "OUT.png")
        _geometry(one, dense=True)
        return one

    pca = kind("pca", "patches coloured by three principal components, the same for all pictures")
    pca.add_argument("--foreground", action="store_true", help="colour the main thing of each picture only")
    attention = kind("attention", "what the class token, or a point of the picture, attends to")
    attention.add_argument("--layer", type=int, default=-1, metavar="N", help="block from 0, or from the end (-1)")
    attention.add_argument("--point", type=_point, metavar="X,Y", help="pixel that asks (the class token)")
    attention.add_argument("--heads", action="store_true", help="every head by itself, not their mean")
    similarity = kind("similarity", "how alike all patches are to the one at a point of the first picture")
    similarity.add_argument("--point", type=_point, required=True, metavar="X,Y", help="pixel of the first picture")


def _models(found: argparse.ArgumentParser) -> None:
    found.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name, or with * and ?")
    found.add_argument("--json", action="store_true", help="as a JSON list")


def _convert(found: argparse.ArgumentParser) -> None:
    found.add_argument("source", metavar="IN", help=_MODEL.removesuffix(" (nano)"))
    found.add_argument("out", metavar="OUT", help="folder; for meta a file that ends in .pth or .safetensors")
    found.add_argument("--to", choices=_FORMATS, required=True, help="whose layout to write")
    found.add_argument("--layout", choices=_FORMATS, help="whose layout IN is, where its names do not tell")
    _overwrite(found)


def _verify(found: argparse.ArgumentParser) -> None:
    found.add_argument("weights", metavar="WEIGHTS", help=_MODEL.removesuffix(" (nano)"))
    found.add_argument("--model", metavar="NAME", help="the model that it should be")


# --- values --------------------------------------------------------------------------------------------------------


def _size(text: str) -> int | tuple[int, int] | str:
    """The side, (height, width), or "own"."""
    if text == "own":
        return text
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"a size is SIDE or HEIGHTxWIDTH in pixels, or own; got {text!r}")
    sides = [int(side) for side in text.split("x")]
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"blocks are numbers with commas between them, as in -1,-4; got {text!r}")
    return [int(number) for number in text.split(",")]


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a point is X,Y in pixels from the upper left corner; got {text!r}") from None
    return x, y


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"give a whole number from 1 on; got {text!r}")
    return int(text)
