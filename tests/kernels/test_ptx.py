"""The compiled PTX of the kernels, executed without a GPU; see run_ptx.py for what is judged."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from ptx_memory import Fault, Memory, Shared
from repository import ROOT

pytest.importorskip("triton", minversion="3.6")


def executed(what: str, seconds: int) -> None:
    """In a process of its own: this one may have Triton as an interpreter."""
    script = ROOT / "tests" / "support" / "run_ptx.py"
    done = subprocess.run([sys.executable, script, what], capture_output=True, text=True, timeout=seconds)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_part() -> None:
    """Every tile of the forward pass for heads of 64 channels in bfloat16, and each kernel between products."""
    executed("part", 300)


@pytest.mark.slow
def test_all_configurations() -> None:
    """Forward and backward, in three dtypes."""
    executed("all", 3000)


@pytest.mark.slow
def test_synchronisation_that_is_missing_is_noticed() -> None:
    """At least 70 % of the kernels with one barrier, fence or wait less."""
    executed("mutants", 3000)


# --- the executor itself -------------------------------------------------------------------------------------------

WARPS = np.arange(64) // 32
FIRST, SECOND = np.array([0]), np.array([32])  # threads of two warps
AT, WORD, OTHER = np.array([16]), np.full((1, 4), 7, np.uint8), np.full((1, 4), 8, np.uint8)


def stored_under_a_copy(shared: Shared) -> None:
    shared.claim(AT, 4, FIRST)
    shared.write(AT, WORD, FIRST)


def read_before_the_copy_is_there(shared: Shared) -> None:
    shared.write(AT, WORD, FIRST)
    shared.claim(AT, 4, FIRST)
    shared.read(AT, 4, FIRST)


def copied_too_early(shared: Shared) -> None:
    shared.write(AT, WORD, FIRST)
    shared.epoch += 1
    shared.read(AT, 4, FIRST)
    shared.claim(AT, 4, SECOND)


def unwritten(shared: Shared) -> None:
    shared.read(AT, 4, FIRST)


def read_too_early(shared: Shared) -> None:
    shared.write(AT, WORD, FIRST)
    shared.read(AT, 4, SECOND)


def written_too_early(shared: Shared) -> None:
    shared.write(AT, WORD, FIRST)
    shared.epoch += 1
    shared.read(AT, 4, FIRST)
    shared.write(AT, OTHER, SECOND)


def written_twice(shared: Shared) -> None:
    shared.write(AT, WORD, FIRST)
    shared.write(AT, OTHER, SECOND)


def beyond(shared: Shared) -> None:
    shared.write(np.array([62]), WORD, FIRST)


def misaligned(shared: Shared) -> None:
    shared.write(np.array([18]), WORD, FIRST)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (unwritten, "nothing wrote"),
        (read_too_early, "race: read"),
        (written_too_early, "race: write"),
        (written_twice, "two warps"),
        (stored_under_a_copy, "copy under way"),
        (read_before_the_copy_is_there, "copy under way"),
        (copied_too_early, "race: copy"),
        (beyond, "outside of shared memory"),
        (misaligned, "misaligned"),
    ],
)
def test_faults_of_shared_memory(act: Callable[[Shared], None], message: str) -> None:
    """Each is one that a GPU would answer with wrong numbers."""
    with pytest.raises(Fault, match=message):
        act(Shared(64, WARPS))


def test_a_barrier_makes_it_right() -> None:
    """What a warp wrote before a barrier another one reads after it."""
    shared = Shared(64, WARPS)
    shared.write(AT, WORD, FIRST)
    shared.epoch += 1
    assert (shared.read(AT, 4, SECOND) == 7).all()


@pytest.mark.parametrize("offset", [-4, 40], ids=["before", "behind"])
def test_faults_of_global_memory(offset: int) -> None:
    """There is nothing between tensors."""
    memory = Memory()
    base = memory.put(np.zeros(10, np.float32))
    memory.put(np.zeros(10, np.float32))
    memory.find(np.array([base, base + 36], np.uint64), 4)
    with pytest.raises(Fault):
        memory.find(np.array([base + 4, base + offset], np.uint64), 4)
