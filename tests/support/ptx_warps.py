"""Memory and warp instructions of the PTX executor: copies, shuffles, mma.sync, wgmma."""

import re
from typing import Any

import numpy as np
from ptx_memory import F32, U32, U64, UNSIGNED, Fault, Memory, Shared, bf16, halves

__all__ = ["Warps"]


class Warps:
    """Instructions of a warp or a warp group; the program implements the methods that are only declared here."""

    n: int
    all: np.ndarray
    lane: np.ndarray
    warp: np.ndarray
    shared: Shared
    r: dict[str, np.ndarray]
    products: list[tuple[set[str], list[np.ndarray]]]
    issued: tuple[set[str], list[np.ndarray]]
    pending: set[str]
    get: Any
    f32: Any
    set: Any
    tally: Any
    _pred: Any
    memory: Memory
    values: dict[str, Any]
    groups: list[list[tuple[Any, ...]]]
    open: list[tuple[Any, ...]]

    # --- memory --------------------------------------------------------------------------------------------------

    def _width(self, parts) -> tuple[int, int, Any]:
        count = int(parts[-2][1:]) if re.fullmatch(r"v\d", parts[-2]) else 1
        size = int(parts[-1][1:]) // 8
        return count, size, {1: np.uint8, 2: np.uint16, 4: U32, 8: U64}[size]

    def _address(self, operand, kind=U64) -> np.ndarray:
        return self.get(operand[1], kind) + kind(operand[2])

    def op_ld(self, parts, o, mask):
        if parts[1] == "param":
            kind = {"64": U64, "32": U32}[parts[-1][1:]]
            every = np.array([int(value) for value in self.values.values()], U64)
            self.set(o[0], every[self.get(o[1][1])].astype(kind), None)
            return
        count, size, kind = self._width(parts)
        threads = self.all if mask is None else np.flatnonzero(mask)
        if not len(threads):
            return
        if parts[1] == "global":
            data, place = self.memory.find(self._address(o[1])[threads], count * size)
            self.tally(f"global, tensor {int(self._address(o[1])[threads][0]) >> 40}", place.size)
            found = data[place]
        else:
            found = self.shared.read(self._address(o[1], U32)[threads], count * size, threads)
        values = np.ascontiguousarray(found).view(kind)
        for i, name in enumerate(o[0] if isinstance(o[0], tuple) else (o[0],)):
            whole = np.zeros(self.n, kind)
            whole[threads] = values[:, i]
            self.set(name, whole, mask)

    def op_st(self, parts, o, mask):
        count, size, kind = self._width(parts)
        threads = self.all if mask is None else np.flatnonzero(mask)
        if not len(threads):
            return
        names = o[1] if isinstance(o[1], tuple) and o[1][0] != "i" else (o[1],)
        values = np.stack([self.get(x, kind)[threads] for x in names], 1).view(np.uint8)
        if parts[1] == "global":
            data, place = self.memory.find(self._address(o[0])[threads], count * size)
            data[place] = values
        else:
            self.shared.write(self._address(o[0], U32)[threads], values, threads)

    def op_cp(self, parts, o, mask):
        if parts[2] == "commit_group":
            self.groups.append(self.open)
            self.open = []
        elif parts[2] == "wait_group":
            keep = o[0][1]
            while len(self.groups) > keep:
                for at, values, threads in self.groups.pop(0):
                    self.shared.land(at, values, threads)
        else:
            threads = self.all if mask is None else np.flatnonzero(mask)
            if not len(threads):
                return
            size = o[2][1]
            values = np.zeros((len(threads), size), np.uint8)
            some = np.ones(len(threads), bool)
            if len(o) > 3:
                some = self.get(o[3])[threads] != 0
            if some.any():
                data, place = self.memory.find(self._address(o[1])[threads][some], size)
                self.tally(f"global, tensor {int(self._address(o[1])[threads][some][0]) >> 40}", place.size)
                values[some] = data[place]
            at = self._address(o[0], U32)[threads]
            self.shared.claim(at, size, threads)
            self.open.append((at, values, threads))

    def op_bar(self, parts, o, mask):
        self.shared.epoch += 1

    def op_fence(self, parts, o, mask):
        self.shared.unfenced[:] = False

    # --- warps ---

    def op_shfl(self, parts, o, mask):
        value, b = self.get(o[1]), self.get(o[2]).astype(np.int64)
        other = self.lane ^ b if parts[2] == "bfly" else b & 31
        self.set(o[0], value[self.warp * 32 + other], mask)

    def op_ldmatrix(self, parts, o, mask):
        count = next(int(x[1:]) for x in parts if re.fullmatch(r"x[124]", x))
        at = self._address(o[1], U32).reshape(-1, 32)[:, : 8 * count].reshape(-1)  # of rows
        threads = self.all.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        rows = self.shared.read(at, 16, threads).reshape(-1, count, 8, 16)  # [warps, matrices, rows, bytes]
        numbers = np.ascontiguousarray(rows).view(np.uint16)  # [W, count, 8, 8]
        if "trans" in parts:
            numbers = numbers.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(numbers).view(U32).reshape(-1, count, 32)  # lane = 4 row + column pair
        for i, name in enumerate(o[0] if isinstance(o[0], tuple) else (o[0],)):
            self.set(name, pairs[:, i].reshape(-1).copy(), mask)

    def op_stmatrix(self, parts, o, mask):
        count = next(int(x[1:]) for x in parts if re.fullmatch(r"x[124]", x))
        at = self._address(o[0], U32).reshape(-1, 32)[:, : 8 * count].reshape(-1)  # of rows
        threads = self.all.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        pairs = np.stack([self.get(x).reshape(-1, 32) for x in o[1][:count]], 1)  # [W, matrices, lanes]
        numbers = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in parts:
            numbers = numbers.transpose(0, 1, 3, 2)
        self.shared.write(at, np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, 16), threads)

    def _mma_tf32(self, o, mask):
        """m16n8k8 on numbers with 10 bits of mantissa; lower bits are ignored."""
        group, pair = self.lane[:32] // 4, self.lane[:32] % 4
        cut = lambda name: (self.get(name) & U32(0xFFFFE000)).view(F32).reshape(-1, 32)  # noqa: E731
        a, b = np.zeros((self.n // 32, 16, 8), F32), np.zeros((self.n // 32, 8, 8), F32)
        for i, name in enumerate(o[1]):
            a[:, group + 8 * (i % 2), pair + 4 * (i // 2)] = cut(name)
        for i, name in enumerate(o[2]):
            b[:, pair + 4 * i, group] = cut(name)
        d = a.astype(np.float64) @ b.astype(np.float64)
        for i, (name, before) in enumerate(zip(o[0], o[3], strict=True)):
            own = d[:, group + 8 * (i // 2), 2 * pair + i % 2].reshape(-1)
            self.set(name, (own + self.f32(before)).astype(F32), mask)

    def op_mma(self, parts, o, mask):
        kind = parts[-2]
        if kind == "tf32" and "m16n8k8" in parts:
            return self._mma_tf32(o, mask)
        if "m16n8k16" not in parts:
            raise NotImplementedError(".".join(parts))
        group, pair = self.lane[:32] // 4, self.lane[:32] % 4
        a = np.zeros((self.n // 32, 16, 16), F32)
        for i, name in enumerate(o[1]):
            values = halves(self.get(name)[:, None], kind).reshape(-1, 32, 2)
            for j in (0, 1):
                a[:, group + 8 * (i % 2), 2 * pair + j + 8 * (i // 2)] = values[:, :, j]
        b = np.zeros((self.n // 32, 16, 8), F32)
        for i, name in enumerate(o[2]):
            values = halves(self.get(name)[:, None], kind).reshape(-1, 32, 2)
            for j in (0, 1):
                b[:, 2 * pair + j + 8 * i, group] = values[:, :, j]
        d = a @ b
        for i, (name, before) in enumerate(zip(o[0], o[3], strict=True)):
            own = d[:, group + 8 * (i // 2), 2 * pair + i % 2].reshape(-1)
            self.set(name, own + self.f32(before), mask)

    def op_wgmma(self, parts, o, mask):
        if parts[1] == "commit_group":
            self.products.append(self.issued)
            self.issued = (set(), [])
        elif parts[1] == "wait_group":
            while len(self.products) > o[0][1]:
                for place in self.products.pop(0)[1]:
                    self.shared.busy[place] -= 1
            self.pending = set().union(self.issued[0], *(names for names, _ in self.products))
        if parts[1] in ("fence", "commit_group", "wait_group"):
            return
        self.pending -= set(o[0])  # may be the accumulator of the next one
        n, deep = map(int, re.search(r"n(\d+)k(\d+)", parts[4]).groups())
        kind, groups = parts[-1], self.n // 128
        if kind == "tf32":
            return self._wgmma_tf32(n, o, mask)
        assert deep == 16
        row = (self.lane // 4 + 16 * (self.warp % 4)).reshape(groups, 128)
        pair = (self.lane % 4).reshape(groups, 128)
        wg = np.arange(groups)[:, None]
        if isinstance(o[1], tuple):
            a = np.zeros((groups, 64, 16), F32)
            for i, name in enumerate(o[1]):
                values = halves(self.get(name)[:, None], kind).reshape(groups, 128, 2)
                for j in (0, 1):
                    a[wg, row + 8 * (i % 2), 2 * pair + j + 8 * (i // 2)] = values[:, :, j]
            rest = o[2:]
        else:
            a = np.stack([self._matrix(int(self.get(o[1], U64)[128 * g]), 64, False, kind) for g in range(groups)])
            rest = o[2:]
        # rest: descriptor of b, scale-d, imm-scale-a, imm-scale-b, [imm-trans-a], imm-trans-b
        trans_b = bool(rest[-1][1])
        if not isinstance(o[1], tuple) and rest[-2][1]:
            a = np.stack([self._matrix(int(self.get(o[1], U64)[128 * g]), 64, True, kind) for g in range(groups)])
        b = np.stack([self._matrix(int(self.get(rest[0], U64)[128 * g]), n, trans_b, kind) for g in range(groups)])
        d = a @ b.transpose(0, 2, 1)  # [groups, 64, n]
        keep = self._pred(rest[1])
        for i, name in enumerate(o[0]):
            own = d[wg, row + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * pair + i % 2].reshape(-1)
            before = np.where(keep, self.f32(name), F32(0)) if name in self.r else np.zeros(self.n, F32)
            self.set(name, (own + before).astype(F32), mask)
        self._under_way(o[0])

    def _renamed(self, name: str, before: str) -> None:
        """A copy of a result under way, which the assembler makes a name of the same register: it is under way too."""
        for names, _ in (self.issued, *self.products):
            if before in names:
                names.add(name)
        self.pending.add(name)

    def _under_way(self, names: tuple[str, ...]) -> None:
        self.issued[0].update(names)
        self.pending |= set(names)

    def _wgmma_tf32(self, n: int, o: tuple[Any, ...], mask: Any) -> None:
        groups = self.n // 128
        row = (self.lane // 4 + 16 * (self.warp % 4)).reshape(groups, 128)
        pair = (self.lane % 4).reshape(groups, 128)
        wg = np.arange(groups)[:, None]
        cut = lambda bits: (bits & U32(0xFFFFE000)).view(F32)  # noqa: E731
        if isinstance(o[1], tuple):
            a = np.zeros((groups, 64, 8), F32)
            for i, name in enumerate(o[1]):
                a[wg, row + 8 * (i % 2), pair + 4 * (i // 2)] = cut(self.get(name)).reshape(groups, 128)
        else:
            at = self.get(o[1], U64)
            a = np.stack([cut(self._matrix(int(at[128 * g]), 64, False, "b32")) for g in range(groups)])
        at = self.get(o[2], U64)
        b = np.stack([cut(self._matrix(int(at[128 * g]), n, False, "b32")) for g in range(groups)])
        d = a.astype(np.float64) @ b.astype(np.float64).transpose(0, 2, 1)
        keep = self._pred(o[3])
        for i, name in enumerate(o[0]):
            own = d[wg, row + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * pair + i % 2].reshape(-1)
            before = np.where(keep, self.f32(name), F32(0)) if name in self.r else np.zeros(self.n, F32)
            self.set(name, (own + before).astype(F32), mask)
        self._under_way(o[0])

    def _matrix(self, descriptor: int, rows: int, transposed: bool, kind: str) -> np.ndarray:
        """[rows, 16] of an operand in shared memory: `rows` along M or N, 16 along K (8 for 32 bits)."""
        size = 4 if kind == "b32" else 2
        deep = 32 // size
        start = (descriptor & 0x3FFF) << 4
        leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
        m, k = np.arange(rows)[:, None], np.arange(deep)[None, :]
        per = width // size
        if not transposed:  # contiguous along K
            at = start + (m // 8) * stride + (m % 8) * width + (k % per) * size + (k // per) * leading
        else:  # contiguous along M or N
            at = start + (m // per) * leading + (k // 8) * stride + (k % 8) * width + (m % per) * size
        at = np.broadcast_to(at, (rows, deep)).astype(np.int64)
        if width > 16:
            at = at ^ ((at >> 3) & (width - 16))
        place = self.shared.where(at.reshape(-1), size)
        self.shared.settled(place)
        if not self.shared.written[place].all():
            raise Fault("wgmma reads shared memory that nothing wrote")
        if self.shared.unfenced[place].any():
            raise Fault("wgmma reads shared memory without a fence")
        warps = np.unique(self.shared.writer[place][self.shared.write_epoch[place] == self.shared.epoch])
        if len(warps):
            raise Fault("race: wgmma reads what was written since the last barrier")
        self.shared.reader[place], self.shared.read_epoch[place] = -2, self.shared.epoch
        self.tally("shared, wgmma", at.size * size)
        self.shared.busy[place] += 1
        self.issued[1].append(place)
        bits = np.ascontiguousarray(self.shared.data[place]).view(UNSIGNED[size])[:, 0].reshape(rows, deep)
        if size == 4:
            return bits
        return bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(F32)
