"""Memory of a GPU for the PTX executor: global memory that finds overruns, and shared memory that finds races."""

from collections.abc import Callable

import numpy as np

__all__ = ["F32", "U32", "U64", "UNSIGNED", "Fault", "Memory", "Shared", "bf16", "halves", "to_bf16"]

U32, U64, F32 = np.uint32, np.uint64, np.float32
UNSIGNED = {2: np.uint16, 4: U32, 8: U64}


class Fault(Exception):
    """A fault that on a GPU gives wrong numbers or a crash."""


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(U32)
    near = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U32)
    return np.where(np.isnan(x), U32(0x7FFF), near)


def halves(bits: np.ndarray, kind: str) -> np.ndarray:
    """Registers [..., n] of two 16-bit numbers each, as float32 [..., 2n]."""
    parts = np.ascontiguousarray(bits).view(np.uint16)
    return bf16(parts) if kind == "bf16" else parts.view(np.float16).astype(F32)


class Memory:
    """Global memory: tensors with gaps between them; an access to a gap raises."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, np.ndarray]] = []

    def put(self, array: np.ndarray) -> int:
        base = (len(self.parts) + 1) << 40
        self.parts.append((base, array.reshape(-1).view(np.uint8)))
        return base

    def find(self, at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        number = int(at[0]) >> 40
        if not 1 <= number <= len(self.parts):
            raise Fault(f"address {int(at[0]):#x} belongs to no tensor")
        base, data = self.parts[number - 1]
        offset = at.astype(np.int64) - base
        if offset.min() < 0 or offset.max() + size > len(data):
            raise Fault(f"outside of tensor {number - 1}: bytes {offset.min()} to {offset.max() + size} of {len(data)}")
        if (offset % size).any():
            raise Fault("misaligned access of global memory")
        return data, offset[:, None] + np.arange(size)


class Shared:
    """Shared memory that records the writers and readers of each address since the last barrier."""

    def __init__(self, size: int, warps: np.ndarray) -> None:
        self.data = np.zeros(size, np.uint8)
        self.written = np.zeros(size, bool)
        self.unfenced = np.zeros(size, bool)  # written by ordinary stores, not yet fenced for wgmma
        self.writer, self.write_epoch = np.full(size, -1), np.full(size, -1)
        self.reader, self.read_epoch = np.full(size, -1), np.full(size, -1)
        self.epoch, self.warps = 0, warps
        self.busy = np.zeros(size, np.int32)  # unfinished products that read it
        self.landing = np.zeros(size, np.int32)  # unfinished copies that write it
        self.tally: Callable[[str, int], None] = lambda what, amount: None

    def where(self, at: np.ndarray, size: int) -> np.ndarray:
        at = at.astype(np.int64)
        if len(at) and (at.min() < 0 or at.max() + size > len(self.data)):
            raise Fault(f"outside of shared memory: {at.min()} to {at.max() + size} of {len(self.data)}")
        if (at % size).any():
            raise Fault("misaligned access of shared memory")
        return at[:, None] + np.arange(size)

    def wavefronts(self, at: np.ndarray, size: int, threads: np.ndarray) -> None:
        """Passes over the 32 banks for these accesses, and the number without bank conflicts."""
        phase = threads * max(1, size // 4) // 32  # with 16 bytes per thread, eight threads at a time
        words = (at.astype(np.int64)[:, None] + np.arange(0, size, 4)) // 4
        phases = np.repeat(phase, words.shape[1])
        pairs = np.unique(phases * (1 << 32) + words.reshape(-1))
        ids = (pairs >> 32) * 32 + pairs % 32
        count = np.bincount(np.unique(ids, return_inverse=True)[1])
        which = np.unique(ids) // 32
        starts = np.flatnonzero(np.r_[True, which[1:] != which[:-1]])
        self.tally("wavefronts", int(np.maximum.reduceat(count, starts).sum()))
        self.tally("wavefronts at least", len(starts))

    def claim(self, at: np.ndarray, size: int, threads: np.ndarray) -> None:
        """Starts a copy, which may write at any time until it is waited for."""
        place = self.where(at, size)
        if self.busy[place].any():
            raise Fault("race: copy to what a wgmma under way reads")
        who = np.broadcast_to(self.warps[threads][:, None], place.shape)
        if ((self.read_epoch[place] == self.epoch) & (self.reader[place] != who)).any():
            raise Fault("race: copy to what another warp read since the last barrier")
        if ((self.write_epoch[place] == self.epoch) & (self.writer[place] != who)).any():
            raise Fault("race: copy to what another warp wrote since the last barrier")
        np.add.at(self.landing, place, 1)

    def land(self, at: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Ends a copy that was waited for."""
        np.subtract.at(self.landing, self.where(at, values.shape[1]), 1)
        self.write(at, values, threads)

    def settled(self, place: np.ndarray) -> None:
        if self.landing[place].any():
            raise Fault("race: access of what a copy under way writes")

    def read(self, at: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        place = self.where(at, size)
        self.tally("shared, read", place.size)
        self.wavefronts(at, size, threads)
        self.settled(place)
        if not self.written[place].all():
            raise Fault("shared memory is read that nothing wrote")
        who = np.broadcast_to(self.warps[threads][:, None], place.shape)
        if ((self.write_epoch[place] == self.epoch) & (self.writer[place] != who)).any():
            raise Fault("race: read of what another warp wrote since the last barrier")
        self.reader[place] = np.where((self.read_epoch[place] == self.epoch) & (self.reader[place] != who), -2, who)
        self.read_epoch[place] = self.epoch
        return self.data[place]

    def write(self, at: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        place = self.where(at, values.shape[1])
        self.tally("shared, written", place.size)
        self.wavefronts(at, values.shape[1], threads)
        self.settled(place)
        who = np.broadcast_to(self.warps[threads][:, None], place.shape)
        if self.busy[place].any():
            raise Fault("race: write of what a wgmma under way reads")
        if ((self.read_epoch[place] == self.epoch) & (self.reader[place] != who)).any():
            raise Fault("race: write of what another warp read since the last barrier")
        if ((self.write_epoch[place] == self.epoch) & (self.writer[place] != who) & (self.data[place] != values)).any():
            raise Fault("race: two warps write one address")
        self.data[place], self.written[place], self.unfenced[place] = values, True, True
        self.writer[place], self.write_epoch[place] = who, self.epoch
