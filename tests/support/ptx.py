"""Runs the PTX that Triton compiles for sm_80 and sm_90a, without a GPU: all threads of a program at once, in NumPy.

It executes each instruction as a GPU does: predicates, shuffles, ldmatrix, mma.sync, wgmma with its shared memory
descriptors and swizzles, cp.async.  Unlike a GPU it raises for an access outside of a tensor, a read of unwritten
shared memory, two warps at one address of shared memory without a barrier (one of them writing), a read of a copy
before the wait for it, an operand of wgmma without a fence, and a divergent branch.  It knows only the instructions
that Triton emits for our kernels; another one raises.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_memory import F32, U32, U64, UNSIGNED, Fault, Memory, Shared, bf16, to_bf16
from ptx_warps import Warps

__all__ = ["Fault", "Memory", "Program"]

COMPARE: dict[str, Callable[..., np.ndarray]] = dict(
    lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal, eq=np.equal, ne=np.not_equal, neu=np.not_equal,
    nan=lambda x, y: np.isnan(x) | np.isnan(y), num=lambda x, y: ~(np.isnan(x) | np.isnan(y)),
)  # fmt: skip
SIGNED = {"s16": np.int16, "s32": np.int32, "s64": np.int64}
SPLIT = re.compile(r",(?![^{\[]*[}\]])")


class Program:
    """A parsed kernel; `run` executes one program of its grid."""

    def __init__(self, ptx: str, shared: int, threads: int) -> None:
        self.shared_size, self.threads = shared, threads
        body = ptx[ptx.index(".entry") :]
        self.params = re.findall(r"\.param\s+\.(\w+)[^,)]*?(\w+_param_\d+)", body[: body.index("\n{")])
        self.code: list[tuple[Any, ...]] = []
        self.labels: dict[str, int] = {}
        for line in body[body.index("\n{") + 2 :].splitlines():
            line = line.split("//")[0].strip()
            if line.startswith(".section") or line.startswith("}") and not line.endswith(";"):
                break
            for part in line.split(";") if not line.startswith("{") or line.endswith(";") else [line]:
                self._read(part.strip())

    def _read(self, line: str) -> None:
        if not line or line.startswith("."):
            return
        if (m := re.fullmatch(r"(\$?\w+):", line)) is not None:
            self.labels[m.group(1)] = len(self.code)
            return
        m = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", line)
        if m is None:
            raise NotImplementedError(f"line {line!r}")
        operands = tuple(self._operand(o.strip()) for o in SPLIT.split(m.group(4)) if o.strip())
        self.code.append((m.group(3), operands, m.group(2), m.group(1) == "!"))

    def _operand(self, text: str) -> Any:
        if text.startswith("{"):
            return tuple(self._operand(o.strip()) for o in text[1:-1].split(",") if o.strip())
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return ("[", base, int(offset or "0", 0))
        if text.startswith("0f"):
            return ("i", int(text[2:], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return ("i", int(text.rstrip("U"), 0))
        return text

    def run(self, arguments: list[Any], memory: Memory, block: int) -> "Run":
        state = Run(self, arguments, memory, block)
        with np.errstate(all="ignore"):
            state.go()
        return state


class Run(Warps):
    def __init__(self, program: Program, arguments: list[Any], memory: Memory, block: int) -> None:
        self.p, self.memory, n = program, memory, program.threads
        self.n, self.all = n, np.arange(n)
        self.lane, self.warp = self.all % 32, self.all // 32
        self.shared = Shared(program.shared_size, self.warp)
        self.r: dict[str, np.ndarray] = {}
        self.special = {"%tid.x": self.all.astype(U32), "%ctaid.x": np.full(n, block, U32)}
        self.special["global_smem"] = np.zeros(n, U32)
        self.values: dict[str, Any] = {}
        for (kind, name), value in zip(program.params, arguments + [0, 0], strict=True):
            self.special[name] = np.full(n, len(self.values), U32)  # its address, which `select` may use
            self.values[name] = np.array(value, F32).view(U32) if kind == "f32" else np.array(value & (2**64 - 1), U64)
        self.groups: list[list[tuple[Any, ...]]] = []
        self.open: list[tuple[Any, ...]] = []
        self.products: list[tuple[set[str], list[np.ndarray]]] = []  # unfinished groups of wgmma
        self.issued: tuple[set[str], list[np.ndarray]] = (set(), [])
        self.pending: set[str] = set()  # registers that they write
        self.steps = 0
        self.counts: dict[str, int] = {}  # instructions by name, bytes and wavefronts by kind of memory
        self.shared.tally = self.tally

    def tally(self, what: str, amount: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + int(amount)

    def get(self, operand: Any, kind: Any = U32) -> np.ndarray:
        if isinstance(operand, tuple):
            return np.full(self.n, operand[1] & (2 ** (8 * np.dtype(kind).itemsize) - 1), kind)
        if operand in self.pending:
            raise Fault(f"{operand} is the result of a wgmma that was not waited for")
        found = self.special.get(operand)
        found = self.r[operand] if found is None else found
        return found if found.dtype == kind else found.astype(kind)

    def f32(self, operand: Any) -> np.ndarray:
        return self.get(operand).view(F32)

    def set(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if name == "_":
            return
        if value.dtype == F32:
            value = value.view(U32)
        if mask is not None and not mask.all():
            old = self.r.get(name)
            value = np.where(mask, value, np.zeros_like(value) if old is None else old.astype(value.dtype))
        self.r[name] = value

    def go(self) -> None:
        at, code = 0, self.p.code
        while at < len(code):
            name, operands, guard, negated = code[at]
            mask = None
            if guard is not None:
                mask = ~self.r[guard] if negated else self.r[guard]
            at += 1
            self.steps += 1
            if self.steps > 5_000_000:
                raise Fault("no end")
            if name.startswith("bra"):
                if mask is None or mask.all():
                    at = self.p.labels[operands[0]]
                elif mask.any():
                    raise Fault("threads take different ways")
                continue
            if name == "ret":
                return
            key = name.split(".")[0]
            self.counts[key] = self.counts.get(key, 0) + 1
            self.step(name, operands, mask)

    def step(self, name: str, o: tuple[Any, ...], mask: np.ndarray | None) -> None:
        parts = name.split(".")
        handler: Callable[..., Any] | None = getattr(self, "op_" + parts[0], None)
        if handler is None:
            raise NotImplementedError(name)
        handler(parts, o, mask)

    # --- arithmetic ----------------------------------------------------------------------------------------------

    def _typed(self, parts: list[str], operand: Any) -> np.ndarray:
        kind = parts[-1]
        if kind == "f32":
            return self.f32(operand)
        unsigned = UNSIGNED[int(kind.lstrip("busf")) // 8]
        return self.get(operand, unsigned).view(SIGNED.get(kind, unsigned))

    def _binary(self, parts: list[str], o: tuple[Any, ...], mask: Any, function: Callable[..., np.ndarray]) -> None:
        if parts[-1].startswith("bf16"):
            raise NotImplementedError(".".join(parts))
        if parts[-1] in ("f16", "f16x2"):
            bits = np.uint16 if parts[-1] == "f16" else U32
            a, b = (np.ascontiguousarray(self.get(x, bits)).view(np.float16) for x in o[1:])
            self.set(o[0], function(a, b).view(bits), mask)
            return
        a, b = self._typed(parts, o[1]), self._typed(parts, o[2])
        out = function(a, b)
        self.set(o[0], out if out.dtype == F32 else out.view(UNSIGNED[out.dtype.itemsize]), mask)

    def op_add(self, parts, o, mask):
        self._binary(parts, o, mask, np.add)

    def op_sub(self, parts, o, mask):
        self._binary(parts, o, mask, np.subtract)

    def op_max(self, parts, o, mask):
        self._binary(parts, o, mask, np.fmax if parts[-1] == "f32" else np.maximum)

    def op_min(self, parts, o, mask):
        self._binary(parts, o, mask, np.fmin if parts[-1] == "f32" else np.minimum)

    def op_mul(self, parts, o, mask):
        if "wide" in parts:
            wide, narrow, bits = {"s32": (np.int64, np.int32, U32), "u32": (U64, U32, U32)}[parts[-1]]
            a, b = (self.get(x, bits).view(narrow).astype(wide) for x in o[1:])
            self.set(o[0], (a * b).view(U64), mask)
        elif "hi" in parts:
            a, b = (self._typed(parts, x) for x in o[1:])
            if a.dtype.itemsize > 4:
                raise NotImplementedError(".".join(parts))
            wide = np.int64 if a.dtype.kind == "i" else U64
            product = (a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize)
            self.set(o[0], product.astype(a.dtype).view(UNSIGNED[a.dtype.itemsize]), mask)
        else:
            self._binary(parts, o, mask, np.multiply)

    def op_mad(self, parts, o, mask):
        if "wide" in parts:
            wide, narrow = {"s32": (np.int64, np.int32), "u32": (U64, U32)}[parts[-1]]
            product = self.get(o[1]).view(narrow).astype(wide) * self.get(o[2]).view(narrow).astype(wide)
            self.set(o[0], product.view(U64) + self.get(o[3], U64), mask)
        else:
            a, b, c = (self._typed(parts, x) for x in o[1:])
            self.set(o[0], (a * b + c).view({4: U32, 8: U64}[a.dtype.itemsize]), mask)

    def op_fma(self, parts, o, mask):
        a, b, c = (self.f32(x).astype(np.float64) for x in o[1:])
        self.set(o[0], (a * b + c).astype(F32), mask)

    def op_div(self, parts, o, mask):
        if parts[-1] == "f32":
            self.set(o[0], self.f32(o[1]) / self.f32(o[2]), mask)
        else:
            a, b = self._typed(parts, o[1]).astype(np.int64), self._typed(parts, o[2]).astype(np.int64)
            self.set(o[0], np.trunc(a / b).astype(np.int32).view(U32), mask)

    def op_neg(self, parts, o, mask):
        a = self._typed(parts, o[1])
        if parts[-1] in ("f16", "bf16"):
            self.set(o[0], a ^ np.uint16(0x8000), mask)
        else:
            self.set(o[0], -a if a.dtype == F32 else (-a).view(UNSIGNED[a.dtype.itemsize]), mask)

    def op_ex2(self, parts, o, mask):
        self.set(o[0], np.exp2(self.f32(o[1])), mask)

    def op_rsqrt(self, parts, o, mask):
        self.set(o[0], (1.0 / np.sqrt(self.f32(o[1]).astype(np.float64))).astype(F32), mask)

    def op_lg2(self, parts, o, mask):
        self.set(o[0], np.log2(self.f32(o[1])), mask)

    def _bits(self, parts, o, mask, function):
        if parts[-1] == "pred":
            self.set(o[0], function(self._pred(o[1]), self._pred(o[2])), mask)
        else:
            self._binary(parts, o, mask, function)

    def _pred(self, operand):
        return np.full(self.n, bool(operand[1])) if isinstance(operand, tuple) else self.r[operand]

    def op_and(self, parts, o, mask):
        self._bits(parts, o, mask, np.bitwise_and)

    def op_or(self, parts, o, mask):
        self._bits(parts, o, mask, np.bitwise_or)

    def op_xor(self, parts, o, mask):
        self._bits(parts, o, mask, np.bitwise_xor)

    def op_not(self, parts, o, mask):
        self.set(o[0], ~self._pred(o[1]) if parts[-1] == "pred" else ~self._typed(parts, o[1]), mask)

    def op_shl(self, parts, o, mask):
        a = self._typed(parts, o[1])
        self.set(o[0], a << self.get(o[2]).astype(a.dtype), mask)

    def op_shr(self, parts, o, mask):
        a = self._typed(parts, o[1])
        self.set(o[0], (a >> self.get(o[2]).astype(a.dtype)).view(UNSIGNED[a.dtype.itemsize]), mask)

    def op_bfe(self, parts, o, mask):
        a, pos, size = self.get(o[1]).astype(np.int64), o[2][1], o[3][1]
        out = (a >> pos) & ((1 << size) - 1)
        if parts[-1] == "s32":
            out = np.where(out >> (size - 1) & 1, out - (1 << size), out)
        self.set(o[0], out.astype(np.int64).astype(U32), mask)

    def op_prmt(self, parts, o, mask):
        eight = np.concatenate([self.get(o[1])[:, None].view(np.uint8), self.get(o[2])[:, None].view(np.uint8)], 1)
        choice = self.get(o[3])[:, None] >> np.array([0, 4, 8, 12], U32) & U32(0xF)
        found = np.take_along_axis(eight, (choice & U32(7)).astype(np.int64), 1)
        found = np.where(choice & U32(8), np.where(found & 0x80, 0xFF, 0), found).astype(np.uint8)
        self.set(o[0], np.ascontiguousarray(found).view(U32)[:, 0], mask)

    def op_selp(self, parts, o, mask):
        kind = UNSIGNED[int(parts[-1][1:]) // 8]
        self.set(o[0], np.where(self._pred(o[3]), self.get(o[1], kind), self.get(o[2], kind)), mask)

    def op_setp(self, parts, o, mask):
        a, b = self._typed(parts, o[1]), self._typed(parts, o[2])
        compare = COMPARE[parts[1]]
        self.set(o[0], compare(a, b), mask)

    def op_mov(self, parts, o, mask):
        if parts[-1] == "pred":
            self.set(o[0], self._pred(o[1]), mask)
        elif isinstance(o[0], tuple) and not (o[0] and o[0][0] == "i"):  # unpack
            small = {"b32": np.uint16, "b64": U32}[parts[-1]]
            whole = self.get(o[1], {"b32": U32, "b64": U64}[parts[-1]])
            for name, piece in zip(o[0], np.ascontiguousarray(whole)[:, None].view(small).T, strict=True):
                self.set(name, np.ascontiguousarray(piece), mask)
        elif isinstance(o[1], tuple) and o[1][0] != "i":  # pack
            small, large = {"b32": (np.uint16, U32), "b64": (U32, U64)}[parts[-1]]
            self.set(o[0], np.stack([self.get(x, small) for x in o[1]], 1).view(large)[:, 0], mask)
        elif o[1] in self.pending and mask is None:
            self.set(o[0], self.r[o[1]], mask)
            self._renamed(o[0], o[1])
        else:
            kind = UNSIGNED[int(parts[-1][1:]) // 8]
            self.set(o[0], self.get(o[1], kind), mask)

    def op_cvt(self, parts, o, mask):
        to = parts[1:]
        if to[-1] == "f32" and to[-2] == "bf16x2":
            self.set(o[0], to_bf16(self.f32(o[1])) << U32(16) | to_bf16(self.f32(o[2])), mask)
        elif to[-1] == "f32" and to[-2] == "f16x2":
            high, low = (self.f32(x).astype(np.float16).view(np.uint16).astype(U32) for x in o[1:])
            self.set(o[0], high << U32(16) | low, mask)
        elif to[-1] == "f32" and to[-2] == "bf16":
            self.set(o[0], to_bf16(self.f32(o[1])).astype(np.uint16), mask)
        elif to[-1] == "f32" and to[-2] == "f16":
            self.set(o[0], self.f32(o[1]).astype(np.float16).view(np.uint16), mask)
        elif to[-1] == "bf16" and to[-2] == "f32":
            self.set(o[0], bf16(self.get(o[1], np.uint16)), mask)
        elif to[-1] == "f16" and to[-2] == "f32":
            self.set(o[0], self.get(o[1], np.uint16).view(np.float16).astype(F32), mask)
        elif to[-1] == "f32" and to[-2] == "tf32":  # rna: to nearest, ties away from zero
            self.set(o[0], (self.get(o[1]) + U32(0x1000)) & U32(0xFFFFE000), mask)
        elif re.fullmatch(r"[us]\d+", to[-1]) and (to[-2] == "f32" or re.fullmatch(r"[us]\d+", to[-2])):
            source = self._typed(to, o[1])
            kind = F32 if to[-2] == "f32" else UNSIGNED[int(to[-2][1:]) // 8]
            self.set(o[0], source.astype(np.int64).astype(kind) if kind != F32 else source.astype(F32), mask)
        else:
            raise NotImplementedError(".".join(parts))
