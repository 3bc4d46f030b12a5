"""Commands and their options.  This module does not import torch, so that help and usage errors come at once."""

import argparse
from collections.abc import Sequence

from ..typos import Parser as _Parser, meant
from ..version import __version__
from .head_options import DEVICE as _DEVICE, HEADS, classify as _classify, levels
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
Run 'dinov3-infer COMMAND --help' for the options of a command.

Every SRC is an image file, a folder (searched recursively), a glob pattern, a URL, or @LIST. A LIST is a file
with one SRC per line, or the output of 'find -print0'; @- reads it from stdin.

exit status: 0 success; 1 failure; 2 wrong usage; 3 success, but some inputs were skipped or could not be verified;
130 interrupted"""

_MODEL = "model name, hub id, folder, weights file or link"
_FORMATS = ("hf", "meta", "timm")
_OF_EMBED = ("search", "dedup", "curate")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line.  "embed search" is one command; to embed a folder called search, write ./search.

    Raises:
        SystemExit: after --help and --version, and for wrong usage.
    """
    given = list(argv)
    found, second = _make_parser(), "".join(given[1:2])
    if given[:1] == ["embed"] and second in _OF_EMBED:
        given[:2] = [f"embed {second}"]
    elif given[:1] == ["embed"] and (near := meant(second, _OF_EMBED)):
        found.error(f"there is no command 'embed {second}'; did you mean 'embed {near}'?")
    return found.parse_args(given)


# fmt: off
# One option in a line or two reads better here than one argument in a line.


def _make_parser() -> argparse.ArgumentParser:
    found = _Parser(
        prog="dinov3-infer",
        description="Extract features from images with the DINO family of vision backbones.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    found.set_defaults(debug=False, quiet=False, verbose=False)
    commands = found.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, parents: tuple[_Parser, ...] = ()) -> argparse.ArgumentParser:
        description = text[0].upper() + text[1:] + "."
        return commands.add_parser(name, help=text, description=description, parents=[*parents, _talk()],
                                   allow_abbrev=False)

    _embed(command("embed", "write one embedding per image to a file or a folder of shards",
                   (_sources(), _model(), _batches(None))))
    _search(command("embed search", "find the images most similar to a given one",
                    (_model("the model that made VECTORS"),)))
    _dedup(command("embed dedup", "remove near-duplicates: list the images that are kept"))
    _curate(command("embed curate", "choose a balanced subset, or images similar to seed images"))
    _features(command("features", "write dense feature maps, one file per image", (_sources(), _model(), _batches(32))))
    _classify(command("classify", "name the most likely ImageNet classes of each image, or your own labels",
                      (_sources(),)))
    _show(command("show", "draw the features of images, their depth or their classes"))
    _explore(command("explore", "write a web page that shows which patches of images are similar",
                     (_sources(), _model())))
    _models(command("models", "list the models that have a name"))
    _convert(command("convert", "write weights in the layout of another library"))
    _export(command("export", "export a model to ONNX or torch.export, and check the file"))
    _bench(command("bench", "measure the speed here against the other libraries that are installed"))
    doctor = command("doctor", "check this installation and print what a bug report needs")
    doctor.add_argument("model", nargs="?", metavar="MODEL",
                        help=f"also print the facts of a model and their sources: {_MODEL}")
    _verify(command("verify", "check weights against published hashes and recorded features"))
    train = commands.add_parser("train", help="train a backbone on images without labels", add_help=False,
                                prefix_chars="\0")
    train.add_argument("rest", nargs="*")  # passed on unparsed, since no word begins with that prefix
    return found


# --- what commands share -------------------------------------------------------------------------------------------


def _talk() -> _Parser:
    found = _Parser(add_help=False)
    found.add_argument("-q", "--quiet", action="store_true", help="print errors only, and no progress bar")
    found.add_argument("-v", "--verbose", action="store_true", help="log what the command does")
    found.add_argument("--debug", action="store_true", help="log more, and print the traceback of an error")
    return found


def _sources() -> _Parser:
    found = _Parser(add_help=False)
    found.add_argument("sources", nargs="+", metavar="SRC", help="image file, folder, glob pattern, URL or @LIST")
    return found


def _model(default: str = "nano") -> _Parser:
    found = _Parser(add_help=False)
    found.add_argument("-m", "--model", help=f"{_MODEL} (default: {default})")
    found.add_argument("--device", default="auto", help=_DEVICE)
    found.add_argument("--dtype", default="auto",
                       help="dtype of the weights: float32, bfloat16 or float16 (default: float32; CUDA then "
                       "multiplies in bfloat16)")
    found.add_argument("--mode", choices=("exact", "fast", "int8", "plain"), default="exact",
                       help="arithmetic on a CPU: float32 (exact), bfloat16 (fast) or int8; plain turns the fast path "
                       "off, on every device (default: exact)")
    found.add_argument("--preprocessing", choices=("meta", "hf", "timm"),
                       help="library whose image transform is used (default: the transform of this package)")
    found.add_argument("--attn-implementation", default="auto", metavar="NAME",
                       help="attention kernel: auto, triton, sdpa or eager (default: auto)")
    found.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the hub repository (default: main)")
    return found


def _batches(default: int | None) -> _Parser:
    found = _Parser(add_help=False)
    found.add_argument("-b", "--batch-size", type=_count, default=default, metavar="N",
                       help=f"images per batch (default: {default or 'the fastest, measured at the start'})")
    found.add_argument("-j", "--workers", dest="num_workers", type=_whole, metavar="N",
                       help="threads that read images (default: as many as torch has; up to 8 with CUDA)")
    return found


def _geometry(found: argparse.ArgumentParser, dense: bool) -> None:
    found.add_argument("--size", type=_size, default=768 if dense else None,
                       help="input size in pixels, SIDE or HEIGHTxWIDTH; 'own' keeps the size of each image (default: "
                       f"{'768' if dense else 'the size of the model'})")
    found.add_argument("--fit", choices=("squash", "crop", "pad", "native"), default="native" if dense else None,
                       help="how an image takes that size: squash it to a square, crop the centre, pad it to a square, "
                       f"or keep its aspect ratio (native) (default: {'native' if dense else 'the fit of the model'})")
    levels(found)


def _out(found: argparse.ArgumentParser, text: str, metavar: str) -> None:
    found.add_argument("-o", "--out", required=True, metavar=metavar, help=text)
    _overwrite(found)


def _overwrite(found: argparse.ArgumentParser) -> None:
    found.add_argument("--overwrite", action="store_true", help="replace existing output")


# --- the commands --------------------------------------------------------------------------------------------------


def _embed(found: argparse.ArgumentParser) -> None:
    _out(found,
         "output file (.npy, .safetensors or .parquet), or folder of shards (a name without suffix, or one that ends "
         "in a slash); a rerun adds the missing rows", "OUT")
    _geometry(found, dense=False)
    found.add_argument("--kind", choices=("embedding", "patches", "map"), default="embedding",
                       help="what to keep of each image: one vector, one vector per patch, or a feature map (default: "
                       "embedding)")
    found.add_argument("--pooling", choices=("cls", "mean", "cls_mean"), default="cls",
                       help="the vector: class token, mean of the patch tokens, or both concatenated (default: cls)")
    found.add_argument("--normalize", action="store_true", help="scale each vector to length 1")
    found.add_argument("--out-dtype", choices=("float32", "float16"), default="float32",
                       help="dtype of the vectors in the file (default: float32)")
    found.add_argument("--decode", choices=("exact", "fast"), default="exact",
                       help="how JPEG files are decoded; fast decodes large ones at reduced size, which changes the "
                       "vectors a little (default: exact)")
    found.add_argument("--shard-size", type=_count, metavar="N",
                       help="images per shard (default: 10,000, or fewer to stay under 256 MiB)")
    found.add_argument("--trust-names", action="store_true",
                       help="in a rerun, do not check whether images have changed")
    _on_error(found)


def _vectors(found: argparse.ArgumentParser) -> None:
    found.add_argument("vectors", metavar="VECTORS", help="file or folder that embed wrote")


def _search(found: argparse.ArgumentParser) -> None:
    found.add_argument("query", metavar="QUERY", help="image, or folder of images")
    _vectors(found)
    found.add_argument("-k", "--count", type=_count, default=20, metavar="N",
                       help="number of images to find (default: 20)")
    found.add_argument("-o", "--out", action="append", metavar="OUT",
                       help="also write the results as a contact sheet (.png, .jpg, .webp) or a list (.txt); can be "
                       "repeated")
    _overwrite(found)


def _dedup(found: argparse.ArgumentParser) -> None:
    _vectors(found)
    _out(found,
         "list of the images that are kept; each removed image is printed with the kept one that it "
         "duplicates", "LIST.txt")
    found.add_argument("--threshold", type=float, metavar="COSINE",
                       help="cosine above which two images are duplicates (default: 0.75; 0.98 with --plain)")
    found.add_argument("--plain", action="store_true", help="compare the vectors without whitening them first")
    found.add_argument("--against", metavar="VECTORS",
                       help="vectors of a test set; images that duplicate it are removed too")
    found.add_argument("--against-threshold", type=float, metavar="COSINE",
                       help="threshold for --against (default: --threshold)")


def _curate(found: argparse.ArgumentParser) -> None:
    _vectors(found)
    _out(found, "list of the chosen images", "LIST.txt")
    found.add_argument("-n", "--count", type=_count, metavar="N",
                       help="number of images to choose; with --seeds an upper limit")
    found.add_argument("--within", metavar="LIST.txt", help="choose only among these images, such as the list of dedup")
    found.add_argument("--clusters", type=_numbers, metavar="N,N,...",
                       help="number of clusters at each level, finest first (default: chosen by the number of images)")
    found.add_argument("--seeds", metavar="VECTORS", help="vectors of seed images; choose images similar to them")
    found.add_argument("--nearest", type=_count, metavar="K",
                       help="take the K nearest images of each seed (default: 4 from 10,000 seeds on; below, whole "
                       "clusters around the seeds)")
    found.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")


def _features(found: argparse.ArgumentParser) -> None:
    _out(found, "folder to write to; its index.jsonl names the image of each file", "DIR")
    _geometry(found, dense=True)
    found.add_argument("--layers", type=_numbers, metavar="N,N,...",
                       help="blocks, counted from 0 or from the end as in -1,-4 (default: -1)")
    found.add_argument("--format", choices=("safetensors", "npy"), default="safetensors",
                       help="file format (default: safetensors)")
    found.add_argument("--half", action="store_true", help="store the maps in float16")
    _on_error(found)


def _on_error(found: argparse.ArgumentParser) -> None:
    found.add_argument("--on-error", choices=("skip", "raise"), default="skip",
                       help="skip an image that cannot be read, or stop with an error (default: skip)")


def _show(found: argparse.ArgumentParser) -> None:
    kinds = found.add_subparsers(dest="kind", metavar="KIND", required=True)

    def kind(name: str, text: str, with_model: bool = True) -> argparse.ArgumentParser:
        parents = [_sources(), *([_model()] if with_model else []), _talk()]
        described = f"{text[0].upper()}{text[1:]}."
        one = kinds.add_parser(name, help=text, description=described, parents=parents, allow_abbrev=False)
        _out(one, "image to write: .png, .jpg or .webp; .gif or .webp for an animation or a video", "OUT.png")
        if with_model:
            _geometry(one, dense=True)
        return one

    pca = kind("pca", "colour patches by their first three principal components, shared by all images")
    pca.add_argument("--foreground", action="store_true", help="colour only the foreground of each image")
    attention = kind("attention", "draw the attention of the class token, or of one point")
    attention.add_argument("--layer", type=int, default=-1, metavar="N",
                           help="block, counted from 0 or from the end (default: -1)")
    attention.add_argument("--point", type=_point, metavar="X,Y",
                           help="point whose attention is drawn, in pixels (default: the class token)")
    attention.add_argument("--heads", action="store_true", help="draw every head instead of the mean over heads")
    similarity = kind("similarity", "draw how similar all patches are to the patch at a point of the first image")
    similarity.add_argument("--point", type=_point, required=True, metavar="X,Y",
                            help="point of the first image, in pixels")
    for name, text, add_options in HEADS:  # they bring a model
        add_options(kind(name, text, with_model=False))


def _explore(found: argparse.ArgumentParser) -> None:
    _out(found, "web page to write; one file that works offline", "OUT.html")
    _geometry(found, dense=True)


def _models(found: argparse.ArgumentParser) -> None:
    found.add_argument("pattern", nargs="?", default="", metavar="PATTERN",
                       help="part of a model name, or a pattern with * and ?")
    found.add_argument("--json", action="store_true", help="print a JSON list")


def _convert(found: argparse.ArgumentParser) -> None:
    found.add_argument("source", metavar="IN", help=_MODEL)
    found.add_argument("out", metavar="OUT", help="folder to write; with --to meta a .pth or .safetensors file")
    found.add_argument("--to", choices=_FORMATS, required=True, help="layout to write")
    found.add_argument("--layout", choices=_FORMATS, help="layout of IN, if its tensor names do not tell")
    found.add_argument("--num-heads", type=_count, metavar="N",
                       help="attention heads of IN, if its files do not state them")
    _overwrite(found)


def _export(found: argparse.ArgumentParser) -> None:
    found.add_argument("model", metavar="MODEL", help=_MODEL)
    found.add_argument("out", metavar="OUT",
                       help="output file: .onnx, or .pt2 (torch.export), which torch runs without this package")
    found.add_argument("--size", type=_pixels,
                       help="input size in pixels, SIDE or HEIGHTxWIDTH (default: the size of the model)")
    free = found.add_mutually_exclusive_group()
    free.add_argument("--fixed", dest="dynamic", action="store_const", const=False, default="batch",
                      help="fix the batch size to 1 (default: any batch size)")
    free.add_argument("--dynamic", action="store_const", const=True, default="batch",
                      help="also allow any height and width in whole patches")
    found.add_argument("--opset", type=_count, default=18, metavar="N", help="ONNX opset (default: 18)")
    found.add_argument("--dtype", default="auto", help="dtype of the weights: float32 or float16 (default: float32)")
    _overwrite(found)


def _bench(found: argparse.ArgumentParser) -> None:
    found.add_argument("model", nargs="?", default="vits16", metavar="MODEL",
                       help="model name, folder or weights file; a name without downloaded weights is measured with "
                       "random ones (default: vits16)")
    found.add_argument("--size", type=_pixels, default=224,
                       help="input size in pixels, SIDE or HEIGHTxWIDTH (default: 224)")
    found.add_argument("-b", "--batch", type=_count, default=1, metavar="N", help="images per batch (default: 1)")
    found.add_argument("--device", default="auto", help=_DEVICE)
    found.add_argument("--dtype", choices=("all", "float32", "bfloat16", "int8"), default="all",
                       help="arithmetic to compare (default: all)")
    found.add_argument("--threads", type=_count, metavar="N",
                       help="threads per library (default: as many as torch has)")
    found.add_argument("--rounds", type=_count, default=9, metavar="N",
                       help="rounds; every library runs in each (default: 9)")
    found.add_argument("--compile", action="store_true", help="also measure the modes of torch.compile; takes minutes")
    found.add_argument("--reference", metavar="DIR", help="also measure Meta's code in this checkout")
    found.add_argument("--json", metavar="FILE", help="write the times of every round to this file")
    _overwrite(found)


def _verify(found: argparse.ArgumentParser) -> None:
    found.add_argument("weights", metavar="WEIGHTS", help=_MODEL)
    found.add_argument("--model", metavar="NAME", help="name of the model that the weights should be")
