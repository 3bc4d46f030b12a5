"""Damaged and hostile tars and Parquet tables, and a reader of all their images."""

import io
import random
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from dinov3_infer import Dinov3Error
from dinov3_infer.images.opening import as_source

from .pickles import rough
from .pictures import wholes
from .runner import judge

BLOCK = 512
SIZES = (0, 1, 511, 512, 513, 2**20, 2**28, 2**31, 2**33, 8**11 - 1, 2**40, 2**63, 2**80, -1, -512, -1024, -(2**40))
KINDS = b"0\x001234567SLKVMDNxgXA\xff7"
MOST = 40  # images of a container that are read


def read(source: Path, draw: random.Random) -> None:
    """Reads each image; returns the last of our errors if none can be read."""
    found, last, count = as_source(source), None, 0
    numbers = list(range(len(found)))
    for number in numbers if len(numbers) <= MOST else draw.sample(numbers, MOST):
        assert str(source) in (found.key(number) or "")
        try:
            image = found.load(number).image
            assert image.ndim == 3 and image.numel()
            count += 1
        except Dinov3Error as error:
            ended, why = judge(error)
            assert ended != "fault", why
            last = error
    if last is not None and not count:
        raise last from None


# --- tars ------------------------------------------------------------------------------------------------------------


@cache
def tars() -> list[bytes]:
    """Tars of each kind, with classes, folders, long names and links."""
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
            for i, content in enumerate((wholes()["PNG"][0], wholes()["JPEG"][0], b"no image", b"")):
                long = "d" * 99 + "/" + "n" * 120 if i == 1 and form != tarfile.USTAR_FORMAT else f"in/{i}"
                for suffix, held in ((".png", content), (".cls", b"%d" % i)):
                    info = tarfile.TarInfo(long + suffix)
                    info.size = len(held)
                    archive.addfile(info, io.BytesIO(held))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        made.append(stream.getvalue())
    return made


def _signed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _number(size: int) -> bytes:
    if 0 <= size < 8**11:
        return b"%011o\0" % size
    return bytes((0x80 if size >= 0 else 0xFF,)) + (size % 2**88).to_bytes(11, "big")


def tar(draw: random.Random, folder: Path) -> tuple[Any, bool]:
    content = draw.choice(tars())
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    heads = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.choice(heads)
        head = bytearray(blocks[at].ljust(BLOCK, b"\0"))
        kind = draw.randrange(9)
        if kind == 0:
            head[124:136] = _number(draw.choice(SIZES))
        elif kind == 1:
            head[156] = draw.choice(KINDS)
        elif kind == 2:
            head[156], head[124:136] = draw.choice(b"xgLKSX"), _number(draw.choice(SIZES))
        elif kind == 3:
            name = draw.choice(
                (b"", b"/etc/passwd.png", b"../x.png", b"\xff\xfe.png", b"a\nb.png", b".x.png", b"#.png")
            )
            head[:100] = name.ljust(100, b"\0")
        elif kind == 4:
            blocks.insert(draw.randrange(len(blocks)), blocks[draw.choice(heads)])
        elif kind == 5:
            del blocks[draw.randrange(len(blocks))]
        elif kind == 6:
            line = draw.choice(
                (b"size=-1536", b"size=x", b"size=" + b"9" * 30, b"path=\xff.png", b"GNU.sparse.major=1")
            )
            record = b"%d %s\n" % (len(line) + 4, line)
            head[156], head[124:136] = draw.choice(b"xg"), _number(len(record))
            blocks.insert(at, record.ljust(BLOCK, b"\0"))
            blocks.insert(at, _signed(head))
        elif kind == 7:
            head[386 : 386 + 24] = _number(draw.choice(SIZES)) + _number(draw.choice(SIZES))
            head[156:157], head[482:483], head[483:495] = b"S", draw.choice((b"\0", b"\1")), _number(draw.choice(SIZES))
        else:
            head[draw.randrange(BLOCK)] = draw.randrange(256)
        if kind in (0, 1, 2, 3, 7, 8) and at < len(blocks):
            blocks[at] = _signed(head)
        heads = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"] or [0]
    content = b"".join(blocks)
    if draw.random() < 0.15:
        content = rough(draw, content)
    path = folder / draw.choice(("a.tar", "caf\u00e9.tar", "A.TAR"))
    path.write_bytes(content)
    return path, content[257:262] == b"ustar"


# --- tables ----------------------------------------------------------------------------------------------------------


@cache
def tables() -> list[bytes]:
    """Tables of each encoding, with a column of bytes or of structures, in one group or several."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    held = [wholes()["PNG"][0], wholes()["JPEG"][0], b"no image", None] * 5
    columns = {
        "image": pa.array([{"bytes": one, "path": "x.png"} for one in held]), "img": pa.array(held, pa.binary()),
        "jpg": pa.array(held, pa.large_binary()), "other": pa.array(held, pa.binary()),
    }  # fmt: skip
    made = []
    for name, column in columns.items():
        for packing in ("none", "snappy", "gzip", "zstd"):
            for dictionary in (True, False):
                stream = io.BytesIO()
                table = pa.table({"label": list(range(len(held))), name: column})
                parquet.write_table(
                    table, stream, compression=packing, use_dictionary=dictionary, row_group_size=_rows(packing),
                    data_page_version=_version(packing), write_statistics=dictionary,
                )  # fmt: skip
                made.append(stream.getvalue())
    return made


def _rows(packing: str) -> int:
    return 3 if packing in ("none", "gzip") else 100


def _version(packing: str) -> str:
    return "2.0" if packing in ("gzip", "zstd") else "1.0"


def table(draw: random.Random, folder: Path) -> tuple[Any, bool]:
    content = bytearray(draw.choice(tables()))
    kind = draw.randrange(6)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    if kind < 3:  # one or some bytes of what says where everything lies, or of what it says that of
        start, end = (footer, len(content) - 8) if kind < 2 else (4, footer)
        for _ in range(draw.choice((1, 1, 2, 8))):
            content[draw.randrange(start, end)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif kind == 3:
        at = draw.randrange(4, footer)
        del content[at : at + draw.choice((1, 4, 100))]
    elif kind == 4:
        content[-8:-4] = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, len(content))).to_bytes(4, "little")
    else:
        content = bytearray(rough(draw, bytes(content)))
    path = folder / draw.choice(("a.parquet", "caf\u00e9.parquet", "A.PARQUET"))
    path.write_bytes(content)
    return path, content[:4] == b"PAR1" == content[-4:]
