"""The compiled passes of a plan: their numbers, their threads, and who does without them for which reason."""

import io
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from dinov3_infer.model.cpu.linear import runs_bfloat16
from dinov3_infer.model.rope import apply_rope
from dinov3_infer_kernels import cpu as fused
from dinov3_infer_kernels.cpu import attended, normed, why_not_fused

compiled = pytest.mark.skipif(why_not_fused() is not None, reason=f"{why_not_fused()}")
DTYPES = [torch.float32, *([torch.bfloat16] if runs_bfloat16() else [])]
FAR = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # root mean square, of values about 1


def plain(qkv: Tensor, angles: Tensor | None, count: int, heads: int) -> Tensor:
    """Attention as the model has it, in float64."""
    parts = qkv.double().unflatten(0, (count, -1)).unflatten(-1, (3, heads, -1))
    q, k, v = parts.unbind(2)
    if angles is not None:
        q, k = (apply_rope(t, angles.cos().double(), angles.sin().double()) for t in (q, k))
    found = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=1.0)
    return found.transpose(1, 2).flatten(2).flatten(0, 1)


def apart(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def table(angles: Tensor) -> Tensor:
    return torch.cat((angles.cos(), angles.sin()), 1)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "count, tokens, heads, width",
    [(3, 1, 1, 32), (1, 5, 2, 64), (2, 64, 1, 64), (1, 65, 3, 96), (2, 131, 2, 128), (1, 201, 6, 64), (1, 1029, 1, 64)],
)
def test_attention(count: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """Every length of the last block of keys, with a rotation and without, against float64."""
    qkv, angles = torch.randn(count * tokens, 3 * heads * width), torch.randn(tokens, width // 2)
    qkv[:, : heads * width] *= 2 * width**-0.5
    qkv = qkv.to(dtype)
    for turns in (None, angles):
        found = attended(qkv, None if turns is None else table(turns), count, heads, dtype)
        assert found.dtype == dtype
        assert apart(found, plain(qkv, turns, count, heads)) < FAR[dtype]


@compiled
def test_large_scores() -> None:
    """One key above all, at the end of a row of keys, by more than a float can hold the power of; and all alike."""
    qkv = torch.zeros(130, 3 * 64)
    qkv[:, 0], qkv[129, 64], qkv[:, 128:] = 30.0, 30.0, torch.randn(130, 64)
    torch.testing.assert_close(attended(qkv, None, 1, 1, torch.float32), qkv[129:, 128:].expand(130, -1))
    qkv[:, :64] = -1000.0
    qkv[:, 64:128] = 10.0
    found = attended(qkv, None, 1, 1, torch.float32)
    torch.testing.assert_close(found, qkv[:, 128:].mean(0, keepdim=True).expand(130, -1), rtol=0, atol=1e-6)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_so(number: float, dtype: torch.dtype) -> None:
    """In q of one token, or in k, which all others see."""
    qkv = torch.randn(130, 3 * 64, dtype=dtype)
    qkv[5, 3] = number
    found = attended(qkv, None, 1, 1, dtype).isfinite()
    assert not found[5].any() and found[6:].all()
    qkv[5, 64 + 3] = number
    qkv[6:, 3] = 0.0  # which makes NaN of infinity too
    assert not attended(qkv, None, 1, 1, dtype)[6:].isfinite().any()


@compiled
def test_attention_in_8_bits() -> None:
    """Rounded to the nearest whole number about 128, and cut off."""
    qkv = torch.randn(70, 3 * 64) * torch.tensor([1.0, 1.0, 120.0]).repeat_interleave(64)
    exact, found = (attended(qkv, None, 1, 1, dtype) for dtype in (torch.float32, torch.uint8))
    assert found.min() == 0 and found.max() == 255
    assert ((found - 128.0) - exact.clamp(-128, 127)).abs().max() <= 0.5 + 1e-4


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 16), (3, 384), (33, 1024), (70, 4096)])
def test_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    """Of the stream and what is added, which stays in it."""
    stream, more, weight, bias = (torch.randn(shape) for shape in ((rows, width), (rows, width), (width,), (width,)))
    more = more.to(dtype)
    for added in (None, more):
        x, expected = stream.clone(), stream if added is None else stream + added.float()
        found = normed(x, added, weight, bias, 1e-5, dtype)
        assert torch.equal(x, expected) and found.dtype == dtype
        assert apart(found, layer_norm(expected.double(), (width,), weight.double(), bias.double())) < FAR[dtype]
    far = normed(stream + 1000.0, None, weight, bias, 1e-5, torch.float32)  # a mean far above the deviation
    expected = layer_norm((stream + 1000.0).double(), (width,), weight.double(), bias.double())
    assert apart(far, expected) < 1e-3


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_neighbours_change_no_bit(dtype: torch.dtype, many_threads: None) -> None:
    """However the queries are cut up, and whatever other pictures there are."""
    qkv, turns = torch.randn(3 * 150, 3 * 128).to(dtype), table(torch.randn(150, 32))
    x, weight, bias = torch.randn(200, 64), torch.randn(64), torch.randn(64)
    torch.set_num_threads(1)
    one = attended(qkv, turns, 3, 2, dtype), normed(x, None, weight, bias, 1e-6, dtype)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(attended(qkv, turns, 3, 2, dtype), one[0])
        assert torch.equal(normed(x, None, weight, bias, 1e-6, dtype), one[1])
        assert torch.equal(attended(qkv[150:300].contiguous(), turns, 1, 2, dtype), one[0][150:300])


# --- who does without --------------------------------------------------------------------------------------------

ASK = "from dinov3_infer_kernels.cpu import why_not_fused; print(why_not_fused())"


def asked(folder: Path, code: str = ASK, **variables: str) -> str:
    """What a new process says, with a cache of its own."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(
    shutil.which("cc") is None or "DINOV3_INFER_COMPILE" in os.environ,
    reason="there is no C compiler, or no wish for it",
)
def test_a_compiler_is_enough() -> None:
    """Where there is one, nothing of this file is skipped."""
    assert why_not_fused() is None


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    assert "DINOV3_INFER_COMPILE=0" in asked(tmp_path, DINOV3_INFER_COMPILE="0")
    assert not list(tmp_path.iterdir())


def test_without_a_compiler(tmp_path: Path) -> None:
    assert asked(tmp_path, PATH="") == "there is no C compiler"


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the compiler")
def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """Its first line is the reason, and nothing is left behind."""
    compiler = script(tmp_path / "broken", "echo 'no such thing' >&2; echo more >&2; exit 1")
    assert asked(tmp_path, CC=compiler) == "the C compiler fails: no such thing"
    assert not list((tmp_path / "dinov3_infer").iterdir())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing is compiled yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DINOV3_INFER_COMPILE", raising=False)
    monkeypatch.setattr(fused, "_started", fused._started.__wrapped__)
    return monkeypatch


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the compiler")
@pytest.mark.parametrize(
    "body, said",
    [
        ("exit 0", "^the C compiler made no library$"),
        (r"printf '\377 no text' >&2; exit 1", "^the C compiler fails: . no text$"),
    ],
    ids=["nothing", "bytes"],
)
def test_something_else_called_cc(body: str, said: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CC", script(tmp_path / "other", body))
    with pytest.raises(OSError, match=said):
        fused._made()


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the compiler")
def test_a_compiler_that_hangs_is_ended(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CC", script(tmp_path / "slow", f"echo $$ > {tmp_path}/pid; sleep 60; exit 1"))
    fresh.setattr(fused, "_SECONDS", 2)
    with pytest.raises(OSError, match="^the C compiler takes more than 2 s$"):
        fused._made()
    _wait_for_the_end(int((tmp_path / "pid").read_text()))


def test_a_fork_that_was_first(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It moved the library that both waited for."""
    place = tmp_path / "fused_key"
    process: Any = SimpleNamespace(communicate=lambda timeout: (fused._keep(b"code", place), ""), returncode=0)
    waiting = fused._Compiler(process, TemporaryDirectory(dir=tmp_path), place, io.BytesIO())
    fresh.setattr(fused, "_started", lambda: waiting)
    assert fused._made().path.read_bytes() == b"code"


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nothing is compiled")
def test_without_a_home(fresh: pytest.MonkeyPatch) -> None:
    """As of a user that the machine has no entry for: a model can be loaded all the same."""

    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    fresh.setattr(Path, "expanduser", nobody)
    fused.start_compiler()
    assert "set XDG_CACHE_HOME" in str(fused._why_not.__wrapped__()) or fused._loaded.cache_info().currsize
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        fused._private_folder()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_folder_that_others_write_to(tmp_path: Path) -> None:
    """What lies there would be run."""
    (tmp_path / "dinov3_infer").mkdir(mode=0o700)
    (tmp_path / "dinov3_infer").chmod(0o777)
    assert "others can write to" in asked(tmp_path)


@compiled
def test_it_is_compiled_once(tmp_path: Path) -> None:
    """In a folder of one's own; the second process finds it, without a compiler."""
    assert asked(tmp_path) == "None"
    (library,) = (tmp_path / "dinov3_infer").iterdir()
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    before = library.stat().st_mtime_ns
    start = "from dinov3_infer_kernels.cpu import start_compiler, _started; start_compiler(); print(_started())"
    assert str(library) in asked(tmp_path, start) and library.stat().st_mtime_ns == before


def _replaced(library: Path, content: bytes) -> None:
    library.unlink()
    library.write_bytes(content)


def _fifo(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


def _link(library: Path) -> None:
    library.rename(library.parent.parent / "elsewhere.so")
    library.symlink_to(library.parent.parent / "elsewhere.so")


def _named_otherwise(library: Path) -> None:
    library.rename(library.with_name(f"{library.stem[:-1]}{'01'[library.stem[-1] == '0']}.so"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half": lambda library: _replaced(library, library.read_bytes()[: library.stat().st_size // 2]),
    "empty": lambda library: _replaced(library, b""),
    "a page of zeros": lambda library: _replaced(
        library, library.read_bytes()[:4096] + bytes(4096) + library.read_bytes()[8192:]
    ),
    "longer": lambda library: _replaced(library, library.read_bytes() + b"x"),
    "text": lambda library: _replaced(library, b"/* no library */"),
    "the group writes": lambda library: library.chmod(0o620),
    "all write": lambda library: library.chmod(0o602),
    "a link": _link,
    "a second name": lambda library: os.link(library, library.parent.parent / "other.so"),
    "a pipe": _fifo,
    "the hash of something else": _named_otherwise,
    "another owner": lambda library: os.chown(library, 65534, 65534),
}


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nothing is compiled")
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_trusted_goes(damage: str, tmp_path: Path) -> None:
    """It is not opened to be loaded, and what takes its place is."""
    if damage == "another owner" and os.geteuid():
        pytest.skip("only root can give files away")
    (tmp_path / "cache").mkdir()
    content, place = os.urandom(10_000), tmp_path / "cache" / "fused_key"
    library = fused._keep(content, place)
    assert fused._kept(place) is not None
    DAMAGE[damage](library.path)
    assert fused._kept(place) is None and list(place.parent.iterdir()) == []
    again = fused._keep(content, place)
    state = again.path.lstat()
    assert os.pread(again.descriptor, 20_000, 0) == content and stat.S_ISREG(state.st_mode)
    assert state.st_uid == os.geteuid() and state.st_nlink == 1 and not state.st_mode & 0o022


@compiled
def test_a_damaged_library_is_made_anew(tmp_path: Path) -> None:
    """No process dies of it, and the next one finds a whole one there."""
    assert asked(tmp_path) == "None"
    (library,) = (tmp_path / "dinov3_infer").iterdir()
    good = library.read_bytes()
    _replaced(library, good[:4096] + bytes(4096) + good[8192:])
    assert asked(tmp_path) == "None" and library.read_bytes() == good


@compiled
def test_what_was_checked_is_what_is_loaded(tmp_path: Path) -> None:
    """Though somebody puts another library in its place between the two."""
    assert asked(tmp_path) == "None"
    swap = """
import os
from dinov3_infer_kernels import cpu
found = cpu._made()
os.unlink(found.path)
found.path.write_bytes(b"no library")
print(cpu.why_not_fused())
"""
    assert asked(tmp_path, swap) == "None"


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the compiler")
@pytest.mark.parametrize(
    "end", ["pass", "os._exit(3)", "os.kill(os.getpid(), 9)", "1 / 0", "os.execv('/bin/true', ['x'])"]
)
def test_a_compiler_ends_with_its_process(end: str, tmp_path: Path) -> None:
    """Whatever ends the process; also what the compiler itself has started."""
    compiler = script(tmp_path / "slow", f"sleep 60 & echo $! $$ > {tmp_path}/ids; wait")
    code = f"""
import os, pathlib, time
from dinov3_infer_kernels.cpu import start_compiler
start_compiler()
while not pathlib.Path({str(tmp_path / "ids")!r}).exists() or not pathlib.Path({str(tmp_path / "ids")!r}).read_text():
    time.sleep(0.01)
{end}
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": compiler, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False)
    ids = [int(number) for number in (tmp_path / "ids").read_text().split()]
    _wait_for_the_end(*ids)
    assert list((tmp_path / "cache" / "dinov3_infer").iterdir()) == []


def _wait_for_the_end(*ids: int) -> None:
    until = time.monotonic() + 10
    while any(map(_runs, ids)):
        assert time.monotonic() < until
        time.sleep(0.02)


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@compiled
def test_wrong_numbers_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that computes something else is not used."""

    def other(x: Tensor, *arguments: Any) -> Tensor:
        return normed(x, *arguments) * 1.001

    monkeypatch.setattr(fused, "normed", other)
    assert fused._why_not.__wrapped__() == "its numbers are not those of the plain form"


def test_heads_that_it_is_not_made_for() -> None:
    assert "48" in str(why_not_fused(head_dim=48)) and "256" in str(why_not_fused(head_dim=256))
