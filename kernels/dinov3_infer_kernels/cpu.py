"""Attention and layer norm, each in one pass: `cpu.c`, compiled once for the CPU that it runs on.

This needs a C compiler (`cc`, or the one that CC names).  The library is compared with torch before it is used.
DINOV3_INFER_COMPILE=0 starts no compiler.

The compiled library is kept in ~/.cache/dinov3_infer or below XDG_CACHE_HOME.  Its file name has the hash of its
content.  It is loaded if the hash is right, the file belongs to the user of the process, and nobody else can write to
it or its folder; otherwise it is removed and compiled again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
from contextlib import suppress
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

__all__ = ["attended", "normed", "start_compiler", "why_not_fused"]

_SOURCE = Path(__file__).with_name("cpu.c")
_TARGET = {"arm64": "-mcpu=native", "aarch64": "-mcpu=native"}
_SECONDS = 60  # that a compiler may take; it takes about one
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_QUERIES, _KEYS, _WIDEST = 12, 16, 128  # as in the source; at most as many keys in a vector
_ONE = Lock()  # one thread waits for the compiler, the others for that thread


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "turns", "out", "space")),
        *((name, c_int64) for name in ("room", "images", "tokens", "heads", "width", "half", "kind", "chunk")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "more", "weight", "bias", "out")),
        *((name, c_int64) for name in ("rows", "width", "half", "kind")),
        ("eps", c_double),
    ]


class _Work(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("run", "job")),
        *((name, c_int64) for name in ("norm", "threads", "next", "workers")),
    ]


def attended(
    qkv: Tensor,  # [B*N, 3*H*D] float32 or bfloat16, the softmax scale in q
    turns: Tensor | None,  # [N, D] float32: cosines and sines of each token
    count: int,  # B images
    heads: int,
    dtype: torch.dtype,  # of the result; uint8: whole numbers about 128
) -> Tensor:
    """Softmax attention of turned q and k, [B*N, H*D]."""
    tokens, width, threads = len(qkv) // count, qkv.shape[1] // (3 * heads), torch.get_num_threads()
    out = torch.empty(len(qkv), heads * width, dtype=dtype, device="cpu")
    parts = -(-2 * threads // (count * heads)) if threads > 1 else 1  # of the queries of a head, so that none waits
    chunk = -(-tokens // (parts * _QUERIES)) * _QUERIES
    room = -(-tokens // _KEYS) * _KEYS * width * 2 * qkv.element_size()
    space = torch.empty(threads * room, dtype=torch.uint8, device="cpu")
    job = _Attention(
        qkv.data_ptr(), None if turns is None else turns.data_ptr(), out.data_ptr(), space.data_ptr(), room,
        count, tokens, heads, width, qkv.dtype == torch.bfloat16, _KINDS[dtype], chunk,
    )  # fmt: skip
    _run(job, 0, threads)
    return out


def normed(
    x: Tensor,  # [T, C] float32
    more: Tensor | None,  # [T, C] float32 or bfloat16, added to x in place
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,  # of the result, as above
) -> Tensor:
    """The layer norm of x after the addition, [T, C]."""
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    job = _Norm(
        x.data_ptr(), None if more is None else more.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(),
        *x.shape, more is not None and more.dtype == torch.bfloat16, _KINDS[dtype], eps,
    )  # fmt: skip
    _run(job, 1, torch.get_num_threads())
    return out


def _run(job: ctypes.Structure, norm: int, threads: int) -> None:
    library, parallel = _loaded()
    library.fused(ctypes.byref(_Work(parallel, ctypes.addressof(job), norm, threads, 0, 0)))


# --- whether it runs here -------------------------------------------------------------------------------------------


def why_not_fused(dtype: torch.dtype = torch.float32, head_dim: int = 64) -> str | None:
    """Why the library cannot be used here, or None if it can."""
    tiles: Any = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    if dtype == torch.bfloat16 and tiles():
        return "this CPU multiplies whole tiles of bfloat16, which torch knows how to use"
    if head_dim % 32 or head_dim > _WIDEST:
        return f"it is made for heads of 32, 64, 96 or {_WIDEST} channels, and these have {head_dim}"
    with _ONE:
        reason = _why_not()
    if reason is None and dtype == torch.bfloat16 and not _multiplies_bfloat16():
        return "the compiler has no products in bfloat16 for this CPU"
    return reason


@cache
def _why_not() -> str | None:
    try:
        wrong = any(not torch.allclose(a, b, atol=most, rtol=min(most, 0.1)) for a, b, most in _pairs())
    except (OSError, RuntimeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "its numbers are not those of the plain form" if wrong else None


def _pairs() -> list[tuple[Tensor, Tensor, float]]:
    """Results of the library, those of torch, and how far they may be apart."""
    draw, found = torch.Generator("cpu").manual_seed(0), list[tuple[Tensor, Tensor, float]]()
    count, tokens, heads, width = 2, 71, 2, 32
    kind: Any = dict(generator=draw, dtype=torch.float32, device="cpu")
    wide = torch.randn(count * tokens, 3 * heads * width, **kind)
    angles = torch.randn(tokens, width // 2, **kind)
    turns, turn = torch.cat((angles.cos(), angles.sin()), 1), torch.polar(torch.ones_like(angles), angles)
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.1))[: 1 + _multiplies_bfloat16()]:
        qkv = wide.to(dtype)
        q, k, v = qkv.float().view(count, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        pairs = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
        q, k = (torch.cat((t.real, t.imag), -1) for t in pairs)
        plain = scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(count * tokens, -1)
        found.append((attended(qkv, turns, count, heads, dtype).float(), plain, most))
        whole, exact = (attended(qkv * 20, None, count, heads, to) for to in (torch.uint8, torch.float32))
        found.append((whole - 128.0, exact.clamp(-128, 127), 0.51))
        x, weight, bias = wide.clone(), wide[0].clone(), wide[1].clone()
        plain = layer_norm(x + qkv.float(), (x.shape[1],), weight, bias)
        found += [(normed(x, qkv, weight, bias, 1e-5, dtype).float(), plain, most), (x, wide + qkv.float(), 1e-6)]
    return found


@cache
def _loaded() -> tuple[Any, int | None]:
    """The library, and the function of OpenMP that runs another one in the threads of torch."""
    library = ctypes.CDLL(_made().address)
    library.fused.restype = None
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return library, None if parallel is None else ctypes.cast(parallel, c_void_p).value


def _multiplies_bfloat16() -> bool:
    return bool(ctypes.c_int.in_dll(_loaded()[0], "multiplies_bfloat16").value)


# --- the compiler --------------------------------------------------------------------------------------------------


class _Library(NamedTuple):
    """A library that may be loaded.  The descriptor shows the file that was checked, even if its path is replaced."""

    descriptor: int
    path: Path

    @property
    def address(self) -> str:
        """A path for the loader, which takes no descriptors.  It remembers names, so this one has the process in it."""
        shown = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        return shown if os.path.exists(shown) else str(self.path)


class _Compiler(NamedTuple):
    process: subprocess.Popen[str]
    folder: Any  # the temporary folder of its output
    place: Path  # where the output belongs, up to the hash in its name
    alive: Any  # open as long as this process lives


# Runs a command, and kills it and what it started when the pipe at stdin is closed, which happens when the process that
# holds the other end ends, for whatever reason.
_WATCHED = """exec 3<&0 </dev/null
"$@" & command=$!
{ read -r _ <&3; kill -9 0; } 2>/dev/null & watch=$!
wait $command; status=$?
kill -9 $watch
exit $status"""


def start_compiler() -> None:
    """Starts to compile the library, if it is not there yet, while the caller does something else.  Optional."""
    try:
        _started()
    except OSError:
        return  # `why_not_fused` has the reason


def _made() -> _Library:
    """The library of this source, compiler and CPU."""
    found = _started()
    if isinstance(found, _Library):
        return found
    if (there := _kept(found.place)) is not None:  # by now: another process was first
        return there
    try:
        said = found.process.communicate(timeout=_SECONDS)[1]
    except subprocess.TimeoutExpired:
        os.killpg(found.process.pid, signal.SIGKILL)  # with what it started
        found.process.wait()
        raise OSError(f"the C compiler takes more than {_SECONDS} s") from None
    finally:
        found.alive.close()
    if found.process.returncode:
        raise OSError(f"the C compiler fails: {said.strip()}")
    try:
        content = Path(found.folder.name, _OUTPUT).read_bytes()
    except FileNotFoundError:
        if (there := _kept(found.place)) is not None:  # it is where a fork of this process was first
            return there
        raise OSError("the C compiler made no library") from None
    found.folder.cleanup()
    return _keep(content, found.place)


@cache
def _started() -> _Library | _Compiler:
    if os.environ.get("DINOV3_INFER_COMPILE") == "0":
        raise OSError("DINOV3_INFER_COMPILE=0 starts no compiler")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None or os.name != "posix":
        raise OSError("there is no C compiler")
    command = [compiler, "-O3", _TARGET.get(platform.machine(), "-march=native"), "-fPIC", "-shared", str(_SOURCE)]
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else [platform.processor()]
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    key = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), *(part.encode() for part in (*command[:-1], cpu)))))
    place = _private_folder() / f"fused_{key.hexdigest()[:20]}"
    if (there := _kept(place)) is not None:
        return there
    folder = tempfile.TemporaryDirectory(prefix="dinov3_infer_")
    command += ["-o", f"{folder.name}/{_OUTPUT}", "-lm"]
    theirs, ours = os.pipe()  # not stdin=PIPE, which communicate() closes
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHED, "sh", *command], stdin=theirs, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, errors="replace", start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(theirs)
    return _Compiler(process, folder, place, os.fdopen(ours, "wb"))


# --- the library on disk -------------------------------------------------------------------------------------------

_OUTPUT = "fused.so"


def _kept(place: Path) -> _Library | None:
    """The library in that place that can be trusted; others are removed."""
    for path in sorted(place.parent.glob(f"{place.name}_*.so")):
        descriptor = _trusted(path)
        if descriptor is not None:
            return _Library(descriptor, path)
        with suppress(OSError):
            path.unlink()
    return None


def _trusted(path: Path) -> int | None:
    """An open descriptor, if only the user of this process can have written it and its name has the right hash."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    state = os.fstat(descriptor)
    alone = state.st_uid == os.geteuid() and state.st_nlink == 1 and not state.st_mode & 0o022
    if alone and stat.S_ISREG(state.st_mode):
        with open(descriptor, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == path.stem.rpartition("_")[2]:
                return descriptor
    os.close(descriptor)
    return None


def _keep(content: bytes, place: Path) -> _Library:
    """Writes a library where `_kept` finds it, to the disk before it gets its name."""
    descriptor, beside = tempfile.mkstemp(dir=place.parent)  # which nobody else may read or write
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(beside, f"{place}_{hashlib.sha256(content).hexdigest()}.so")
    finally:
        with suppress(FileNotFoundError):
            os.unlink(beside)
    if (there := _kept(place)) is None:
        raise OSError(f"a library that was written to '{place.parent}' cannot be read back; check the disk")
    return there


def _private_folder() -> Path:
    """The folder of the library, which is code, so that nobody else may write to it."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dinov3_infer"
    except RuntimeError:
        raise OSError("there is no home directory to keep the library in; set XDG_CACHE_HOME") from None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.geteuid() or state.st_mode & 0o022:
        raise OSError(f"others can write to '{folder}': chmod go-w on it")
    return folder
