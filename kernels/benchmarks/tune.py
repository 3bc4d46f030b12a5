"""The fastest configuration for each pass, width and length, and the length from which torch's attention is faster.

Candidates are the rows of the shipped table for all chips and a wider grid.  They are compiled by many processes at
once, compared with the definition, and timed in interleaved rounds.  The results are printed as Python for
`configs.TABLE`, and can be applied to this process, so that later measurements use them.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from math import sqrt
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from measure import relative_error, replayed
from operators import HEADS, LIMIT, random_inputs
from peers import Inputs, fused, rotation_and_sdpa

from dinov3_infer.cli.bench.contest import Run, Settings, interleaved, reason
from dinov3_infer.model.attention import sdpa_attention
from dinov3_infer_kernels import gpu as launchers
from dinov3_infer_kernels.gpu.backward import key_value_kernel, query_kernel
from dinov3_infer_kernels.gpu.configs import ANY, TABLE, Config, chip_of
from dinov3_infer_kernels.gpu.forward import forward_kernel

# most tokens of a row of the table -> the side in patches at which it is tuned
BUCKETS = {640: 16, 2048: 32, ANY: 64}
CROSSINGS = (24, 32, 40, 48, 64, 96, 128)  # sides in patches: 581 to 16389 tokens
SMALL = ((64, 32), (32, 64), (64, 64), (64, 128), (128, 32), (128, 64))  # tiles of four warps
LARGE = ((64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 64))  # of eight
COMPILE_SECONDS = 130  # for all candidates
FEW = 12  # candidates of a short run
DTYPES = {2: "bfloat16", 4: "float32"}
KERNELS = {"forward": forward_kernel, "key_value": key_value_kernel, "query": query_kernel}


def candidates(key: tuple[str, int, int], settings: Settings) -> list[Config]:
    shipped = [config for rows in TABLE[key].values() for _, config in rows]
    if not settings.cuda or key[2] == 4:
        return list(dict.fromkeys(shipped))[: None if settings.cuda else 2]
    wider = [Config(*blocks, 4, stages) for blocks, stages in product(SMALL, (2, 3, 4))]
    wider += [Config(*blocks, 8, stages) for blocks, stages in product(LARGE, (2, 3, 4))]
    if key[0] == "key_value":  # its own rows are keys
        wider = [Config(c.block_n, c.block_m, c.warps, c.stages) for c in wider]
    return list(dict.fromkeys(shipped + wider))


def keys(settings: Settings) -> list[tuple[str, int, int]]:
    """The passes of 16-bit numbers first: the forward pass of both widths, then the backward pass."""
    ordered = sorted(TABLE, key=lambda key: (key[2], key[0] != "forward", key[1]))
    return ordered if settings.cuda else [key for key in ordered if key[1:] == (64, 2)]


def launcher(kind: str, x: Inputs, config: Config) -> Callable[[], torch.Tensor]:
    """One pass with this configuration; the other half of the backward pass keeps that of the table."""
    rest = (x.cos, x.sin, x.cu_seqlens, x.longest or x.qkv.shape[1], x.qkv.shape[-1] ** -0.5)
    if kind == "forward":
        return lambda: launchers.forward(x.qkv, *rest, config=config)[0]
    out, lse = launchers.forward(x.qkv, *rest)
    given = {f"{kind}_config": config}
    return lambda: launchers.backward(out, x.qkv, *rest, out, lse, **given)


def inputs(key: tuple[str, int, int], side: int, settings: Settings, tokens: int = 16384) -> list[Inputs]:
    """Of a batch.  Rows of 16 bits are tuned in bfloat16; the interpreter has no bfloat16 and takes float16."""
    _, width, size = key
    dtype = DTYPES[size] if settings.cuda else {2: "float16", 4: "float32"}[size]
    count, heads = side * side + 5, HEADS[width] if settings.cuda else 1
    batch = max(1, tokens // count) if settings.cuda else 1
    shape = dict(side=side, tokens=count, width=width, heads=heads, batch=batch, dtype=dtype)
    return random_inputs(shape, settings)


def compile_one(key: tuple[str, int, int], config: Config, settings: Settings) -> str | None:
    """Compiles into Triton's cache, in another process; why the configuration cannot be used, or None."""
    return trial(key[0], inputs(key, 16 if settings.cuda else 2, settings, tokens=1)[0], config)


def trial(kind: str, x: Inputs, config: Config) -> str | None:
    """Runs it once; a configuration that spills registers is refused like one that does not run."""
    try:
        launcher(kind, x, config)()
        if x.qkv.is_cuda:
            torch.cuda.synchronize()
            newest = list(KERNELS[kind].device_caches[x.qkv.device.index][0].values())[-1]
            return f"{newest.n_spills} registers spilled" if newest.n_spills else None
    except Exception as error:
        return reason(error)
    return None


@cache
def packed_trial(key: tuple[str, int, int], config: Config, settings: Settings) -> str | None:
    """The same with the first image as one packed sequence."""
    x = inputs(key, 16 if settings.cuda else 2, settings, tokens=1)[0]
    ends = torch.tensor([0, x.qkv.shape[1]], dtype=torch.int32, device=x.qkv.device)
    return trial(key[0], Inputs(x.qkv[0], x.cos, x.sin, ends, x.qkv.shape[1]), config)


def prepared(run: Run, settings: Settings) -> Run:
    run()
    return replayed(run) if settings.cuda else run


def expected(kind: str, x: Inputs) -> torch.Tensor:
    qkv = x.qkv.detach()[:1].float().requires_grad_(kind != "forward")
    out = sdpa_attention(qkv, x.cos, x.sin)
    if kind == "forward":
        return out
    grad = launchers.forward(x.qkv[:1], x.cos, x.sin, None, x.qkv.shape[1], x.qkv.shape[-1] ** -0.5)[0]
    return torch.autograd.grad(out, qkv, grad.float())[0]


def tune_row(
    key: tuple[str, int, int], side: int, configs: dict[Config, str | None], settings: Settings
) -> list[dict[str, Any]]:
    """All candidates, the fastest first; wrong ones and those that do not run last."""
    sets, rows = inputs(key, side, settings), []
    judge, runs = expected(key[0], sets[0]), {}
    limit = 2 * LIMIT[str(sets[0].qkv.dtype).removeprefix("torch.")]
    for config, refusal in configs.items():
        row: dict[str, Any] = {"config": asdict(config)}
        if refusal is None:
            try:
                calls = [launcher(key[0], x, config) for x in sets]
                row["error"] = relative_error(calls[0]()[:1], judge)
                refusal = None if row["error"] <= limit else "wrong"
                if refusal is None:
                    runs[str(config)] = prepared(lambda calls=calls: [call() for call in calls], settings)
            except Exception as error:
                refusal = reason(error)
        rows.append(row | ({"refused": refusal} if refusal else {"name": str(config)}))
    times = interleaved(runs, settings)
    for row in rows:
        if (name := row.pop("name", None)) is not None:
            row["ms"] = median(times[name]) / len(sets)
    rows.sort(key=lambda row: row.get("ms", float("inf")))
    for row in rows:  # the first has to serve packed images too
        if "ms" not in row or not (refusal := packed_trial(key, Config(**row["config"]), settings)):
            break
        del row["ms"]
        row["refused"] = f"packed: {refusal}"
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def crossing(width: int, settings: Settings) -> dict[str, Any]:
    """The length at which the fused kernel takes as long as one rotation and torch's own attention."""
    ratios = {}
    for side in CROSSINGS if settings.cuda else (4, 5):
        sets = inputs(("forward", width, 2), side, settings)
        calls = {"fused": fused, "rotation + SDPA": rotation_and_sdpa}
        with torch.no_grad():
            runs = {
                name: prepared(lambda call=call, sets=sets: [call(x) for x in sets], settings)
                for name, call in calls.items()
            }
            times = interleaved(runs, settings)
        ratios[side * side + 5] = median(b / a for a, b in zip(*times.values(), strict=True))
    wins = [tokens for tokens, ratio in ratios.items() if ratio >= 1.0]
    above = [tokens for tokens in ratios if tokens > max(wins, default=0)]
    found = 0 if not wins else round(sqrt(max(wins) * min(above))) if above else ANY
    return {"width": width, "tokens": found, "sdpa_over_fused": ratios}


def tune_part(
    settings: Settings, deadline: float = 3 * COMPILE_SECONDS, short: bool = False
) -> Iterator[dict[str, Any]]:
    """One entry per pass and width, and the crossovers: yielded as they are found.

    `short`: a dozen candidates of the forward pass with heads of 64 channels, and no crossover.
    """
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        work = partial(compile_one, settings=settings)
        plans = {key: candidates(key, settings) for key in (keys(settings)[:1] if short else keys(settings))}
        plans = {key: found[:FEW] if short else found for key, found in plans.items()}
        futures = {key: [pool.submit(work, key, config) for config in plan] for key, plan in plans.items()}
        wait([future for found in futures.values() for future in found], min(COMPILE_SECONDS, deadline / 3))
        refusals = {
            key: [future.result() if future.done() else "not compiled in time" for future in found]
            for key, found in futures.items()
        }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # timing has the GPU to itself
    for key, plan in plans.items():
        configs = dict(zip(plan, refusals[key], strict=True))
        entry: dict[str, Any] = {"key": list(key), "chip": chip_of(settings.device), "rows": {}}
        for limit, side in BUCKETS.items() if settings.cuda else {ANY: 4}.items():
            entry["rows"][str(limit)] = tune_row(key, side, configs, settings)
        apply_entry(entry)
        yield entry
    for width in () if short else HEADS if settings.cuda else (64,):
        entry = {"crossover": crossing(width, settings)}
        apply_entry(entry)
        yield entry


def chosen(entry: dict[str, Any]) -> tuple[tuple[int, Config], ...]:
    """Rows for the table; neighbours with one configuration are one row.  Empty if nothing ran."""
    best = [(int(limit), Config(**rows[0]["config"])) for limit, rows in entry["rows"].items() if "ms" in rows[0]]
    return tuple(row for row, after in zip(best, [*best[1:], None], strict=True) if not after or after[1] != row[1])


def apply_entry(entry: dict[str, Any]) -> None:
    """Makes this process use the configurations that were found."""
    if "crossover" in entry:
        limits = _crossovers()
        limits[entry["crossover"]["width"]] = entry["crossover"]["tokens"]
        return
    kind, width, size = entry["key"]
    if rows := chosen(entry):
        TABLE[kind, width, size][entry["chip"]] = rows


_found: dict[int, int] = {}


def _crossovers() -> dict[int, int]:
    """The crossovers that were found, which replace those of the launchers."""
    if not _found:
        said = launchers.crossover
        launchers.crossover = lambda device, dtype, width: _found.get(width, said(device, dtype, width))
    return _found


def as_python(entries: list[dict[str, Any]]) -> str:
    """Lines to paste into configs.py."""
    lines = []
    for entry in entries:
        if "crossover" in entry:
            lines.append(f"crossover, width {entry['crossover']['width']}: {entry['crossover']['tokens']}")
            continue
        rows = ", ".join(
            f"({'ANY' if limit == ANY else limit}, Config({c.block_m}, {c.block_n}, {c.warps}, {c.stages}))"
            for limit, c in chosen(entry)
        )
        lines.append(f'{tuple(entry["key"])}: "{entry["chip"]}": ({rows},),')
    return "\n".join(lines)
