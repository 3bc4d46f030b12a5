"""Commands and their options.  Nothing here imports torch: help and usage errors come at once."""

import argparse
from collections.abc import Sequence

from ..typos import Parser as _Parser, meant
from ..version import __version__
from .head_options import HEADS, classify as _classify
from .values import (
    count as _count,
    numbers as _numbers,
    pixels as _pixels,
    point as _point,
    size as _size,
    whole as _whole,
)

__all__ = ["parse"]

_EPILOG = """\
exit status: 0 done; 1 failed; 2 wrong usage; 3 done, but something was left out; 130 interrupted

dinov3-infer COMMAND --help shows the options of a command, with what holds without them in parentheses. SRC is a
file, a folder (searched to the bottom), a pattern, an address, or @LIST for a file with one of these per line (find
-print0 is understood, @- is stdin)."""

_MODEL = "name, hub id, folder, weights file or link (nano)"
_FORMATS = ("hf", "meta", "timm")


_OF_EMBED = ("search", "dedup", "curate")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """A command line.  "embed search" is one command; a folder of that name is ./search.

    Raises: SystemExit for help, the version and wrong usage.
    """
    given = list(argv)
    found, second = _make_parser(), "".join(given[1:2])
    if given[:1] == ["embed"] and second in _OF_EMBED:
        given[:2] = [f"embed {second}"]
    elif given[:1] == ["embed"] and (near := meant(second, _OF_EMBED)):
        found.error(f"there is no command 'embed {second}'; did you mean 'embed {near}'?")
    return found.parse_args(given)


def _make_parser() -> argparse.ArgumentParser:
    found = _Parser(
        prog="dinov3-infer",
        description="Features from images with the DINO family of vision backbones.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    found.set_defaults(debug=False, quiet=False, verbose=False)
    commands = found.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, parents: tuple[_Parser, ...] = ()) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        return commands.add_parser(
            name, help=text, description=description, parents=[*parents, _talk()], allow_abbrev=False
        )

    _embed(command("embed", "one vector per picture, in a file or in shards", (_sources(), _model(), _batches(None))))
    _search(command("embed search", "the pictures most like a given one", (_model(),)))
    _dedup(command("embed dedup", "a list of pictures without near-duplicates"))
    _curate(command("embed curate", "a list that is balanced over what there is, or like seed pictures"))
    _features(command("features", "dense feature maps, one file per picture", (_sources(), _model(), _batches(32))))
    _classify(command("classify", "the likeliest labels of each picture: ImageNet's, or yours", (_sources(),)))
    _show(command("show", "an image of what the features hold: components, attention, depth, classes"))
    _explore(command("explore", "a page that shows which patches of images are similar", (_sources(), _model())))
    _models(command("models", "the models that can be named"))
    _convert(command("convert", "weights in the layout of another library"))
    _export(command("export", "a file for another engine, checked in that engine"))
    _bench(command("bench", "how fast this is here, beside everything else that is installed"))
    doctor = command("doctor", "what this installation is and whether it works: for bug reports")
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="what of it is taken from where: " + _MODEL)
    _verify(command("verify", "whether weights are what they claim to be"))
    train = commands.add_parser(
        "train", help="train a backbone on pictures without labels", add_help=False, prefix_chars="\0"
    )
    train.add_argument("rest", nargs="*")  # as they are, since no word begins with that prefix
    return found


# --- what commands share -------------------------------------------------------------------------------------------


def _group() -> _Parser:
    return _Parser(add_help=False)


def _talk() -> _Parser:
    found = _group()
    found.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors, and show no bar")
    found.add_argument("-v", "--verbose", action="store_true", help="log what is done")
    found.add_argument("--debug", action="store_true", help="log more, and show the traceback of an error")
    return found


def _sources() -> _Parser:
    found = _group()
    found.add_argument("sources", nargs="+", metavar="SRC", help="picture, folder, pattern, address or @LIST")
    return found


def _model() -> _Parser:
    found = _group()
    found.add_argument("-m", "--model", help=_MODEL)
    found.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (auto: cuda if there is one)")
    found.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (auto: float32, mixed on CUDA)")
    found.add_argument(
        "--mode", choices=("exact", "fast", "int8", "plain"), default="exact",
        help="products in float32, bfloat16 or 8 bits on a CPU; plain: without the fast path (exact)",
    )  # fmt: skip
    found.add_argument(
        "--preprocessing", choices=("meta", "hf", "timm"), help="whose transform of images (that of this package)"
    )
    found.add_argument(
        "--attn-implementation", default="auto", metavar="NAME", help="auto, triton, sdpa or eager (auto)"
    )
    found.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub repository (main)")
    return found


def _batches(default: int | None) -> _Parser:
    found = _group()
    shown = default or "what is found to be fastest"
    found.add_argument(
        "-b", "--batch-size", type=_count, default=default, metavar="N", help=f"pictures per pass ({shown})"
    )
    found.add_argument(
        "-j",
        "--workers",
        dest="num_workers",
        type=_whole,
        metavar="N",
        help="threads that read pictures (those of torch; CUDA: up to 8)",
    )
    return found


def _geometry(found: argparse.ArgumentParser, dense: bool) -> None:
    default = "768 pixels" if dense else "that of the model"
    found.add_argument(
        "--size",
        type=_size,
        default=768 if dense else None,
        help=f"SIDE or HEIGHTxWIDTH in pixels, or own ({default})",
    )
    found.add_argument(
        "--fit", choices=("squash", "crop", "pad", "native"), default="native" if dense else None,
        help="squash: to a square; crop: the centre; pad: filled up to a square; native: with its own aspect ratio "
        f"({'native' if dense else 'that of the model'})",
    )  # fmt: skip
    text = "of images of more than 8 bits what is black and white; or full (of their type), or percentile (their own)"
    found.add_argument("--levels", metavar="LOW,HIGH", help=text)


def _out(found: argparse.ArgumentParser, text: str, metavar: str) -> None:
    found.add_argument("-o", "--out", required=True, metavar=metavar, help=text)
    _overwrite(found)


def _overwrite(found: argparse.ArgumentParser) -> None:
    found.add_argument("--overwrite", action="store_true", help="replace what is there")


# --- the commands --------------------------------------------------------------------------------------------------


def _embed(found: argparse.ArgumentParser) -> None:
    _out(
        found, ".npy, .safetensors or .parquet; with a slash behind it, or without suffix, a folder of shards. A rerun "
        "adds what is missing", "OUT",
    )  # fmt: skip
    _geometry(found, dense=False)
    found.add_argument(
        "--kind", choices=("embedding", "patches", "map"), default="embedding",
        help="what is kept of a picture: one vector, one for each patch, or these as a map (embedding)",
    )  # fmt: skip
    found.add_argument(
        "--pooling", choices=("cls", "mean", "cls_mean"), default="cls",
        help="what the vector is: the class token, the mean of the patches, or both in a row (cls)",
    )  # fmt: skip
    found.add_argument("--normalize", action="store_true", help="vectors of length 1")
    found.add_argument(
        "--out-dtype", choices=("float32", "float16"), default="float32", help="of the numbers in the file (float32)"
    )
    found.add_argument(
        "--decode", choices=("exact", "fast"), default="exact",
        help="fast: large JPEGs are made smaller by their decoder, which changes vectors a little (exact)",
    )  # fmt: skip
    found.add_argument("--shard-size", type=_count, metavar="N", help="pictures written at a time (10,000 or 256 MiB)")
    found.add_argument("--trust-names", action="store_true", help="a rerun does not look whether images have changed")
    _on_error(found)


def _vectors(found: argparse.ArgumentParser) -> None:
    found.add_argument("vectors", metavar="VECTORS", help="file or folder of embed")


def _search(found: argparse.ArgumentParser) -> None:
    found.add_argument("query", metavar="QUERY", help="picture, or a folder of some")
    _vectors(found)
    found.add_argument("-k", "--count", type=_count, default=20, metavar="N", help="pictures to find (20)")
    found.add_argument(
        "-o", "--out", action="append", metavar="OUT", help="a sheet of them (.png .jpg .webp), or a list (.txt)"
    )
    _overwrite(found)


def _dedup(found: argparse.ArgumentParser) -> None:
    _vectors(found)
    _out(found, "list of the pictures that stay; the others go to stdout, each with the one that stays", "LIST.txt")
    found.add_argument("--threshold", type=float, metavar="COSINE", help="above it they are alike (0.75; --plain 0.98)")
    found.add_argument("--plain", action="store_true", help="cosine of the vectors as they are, not whitened")
    found.add_argument("--against", metavar="VECTORS", help="of a test set: what is like it does not stay either")
    found.add_argument("--against-threshold", type=float, metavar="COSINE", help="for that (the same)")


def _curate(found: argparse.ArgumentParser) -> None:
    _vectors(found)
    _out(found, "list of the pictures chosen", "LIST.txt")
    found.add_argument("-n", "--count", type=_count, metavar="N", help="how many; with --seeds at most")
    found.add_argument("--within", metavar="LIST.txt", help="choose among these, such as those that dedup has kept")
    found.add_argument("--clusters", type=_numbers, metavar="N,N,...", help="of each level, the finest first")
    found.add_argument("--seeds", metavar="VECTORS", help="of seed pictures: choose what is like them")
    found.add_argument(
        "--nearest", type=_count, metavar="K",
        help="the K nearest of each seed (4 for 10,000 seeds and more; for fewer the clusters that they fall into)",
    )  # fmt: skip
    found.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")


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
    found.add_argument(
        "--on-error", choices=("skip", "raise"), default="skip",
        help="a picture that cannot be read is left out, or ends the command (skip)",
    )  # fmt: skip


def _show(found: argparse.ArgumentParser) -> None:
    kinds = found.add_subparsers(dest="kind", metavar="KIND", required=True)

    def kind(name: str, text: str, with_model: bool = True) -> argparse.ArgumentParser:
        parents = [_sources(), *([_model()] if with_model else []), _talk()]
        described = f"{text[0].upper()}{text[1:]}."
        one = kinds.add_parser(name, help=text, description=described, parents=parents, allow_abbrev=False)
        _out(one, "image to write: .png, .jpg or .webp", "OUT.png")
        if with_model:
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
    for name, text, add_options in HEADS:  # which bring their own model
        add_options(kind(name, text, with_model=False))


def _explore(found: argparse.ArgumentParser) -> None:
    _out(found, "page to write, one file that needs no network", "OUT.html")
    _geometry(found, dense=True)


def _models(found: argparse.ArgumentParser) -> None:
    found.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name, or with * and ?")
    found.add_argument("--json", action="store_true", help="as a JSON list")


def _convert(found: argparse.ArgumentParser) -> None:
    found.add_argument("source", metavar="IN", help=_MODEL.removesuffix(" (nano)"))
    found.add_argument("out", metavar="OUT", help="folder; for meta a file that ends in .pth or .safetensors")
    found.add_argument("--to", choices=_FORMATS, required=True, help="whose layout to write")
    found.add_argument("--layout", choices=_FORMATS, help="whose layout IN is, where its names do not tell")
    found.add_argument("--num-heads", type=_count, metavar="N", help="of IN, where its files do not state it")
    _overwrite(found)


def _export(found: argparse.ArgumentParser) -> None:
    found.add_argument("model", metavar="MODEL", help=_MODEL.removesuffix(" (nano)"))
    found.add_argument("out", metavar="OUT", help=".onnx, or .pt2 for torch without this package")
    found.add_argument("--size", type=_pixels, help="SIDE or HEIGHTxWIDTH in pixels (that of the model)")
    free = found.add_mutually_exclusive_group()
    free.add_argument(
        "--fixed", dest="dynamic", action="store_const", const=False, default="batch",
        help="one picture at a time (any number of them)",
    )  # fmt: skip
    free.add_argument(
        "--dynamic", action="store_const", const=True, default="batch", help="height and width of any whole patches too"
    )
    found.add_argument("--opset", type=_count, default=18, metavar="N", help="of ONNX (18)")
    found.add_argument("--dtype", default="auto", help="of the weights: float32 or float16 (auto: float32)")
    _overwrite(found)


def _bench(found: argparse.ArgumentParser) -> None:
    found.add_argument(
        "model", nargs="?", default="vits16", metavar="MODEL",
        help="name, folder or weights file (vits16); a name whose weights are not here gets random ones",
    )  # fmt: skip
    found.add_argument("--size", type=_pixels, default=224, help="SIDE or HEIGHTxWIDTH in pixels (224)")
    found.add_argument("-b", "--batch", type=_count, default=1, metavar="N", help="pictures per pass (1)")
    found.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (auto: cuda if there is one)")
    found.add_argument(
        "--dtype", choices=("all", "float32", "bfloat16", "int8"), default="all", help="of products (all)"
    )
    found.add_argument("--threads", type=_count, metavar="N", help="of each contestant (those of torch)")
    found.add_argument("--rounds", type=_count, default=9, metavar="N", help="in which all run once (9)")
    found.add_argument("--compile", action="store_true", help="torch.compile in its modes too, which takes minutes")
    found.add_argument("--reference", metavar="DIR", help="Meta's code too, from a checkout of it")
    found.add_argument("--json", metavar="FILE", help="write the record of every round")
    _overwrite(found)


def _verify(found: argparse.ArgumentParser) -> None:
    found.add_argument("weights", metavar="WEIGHTS", help=_MODEL.removesuffix(" (nano)"))
    found.add_argument("--model", metavar="NAME", help="the model that it should be")
