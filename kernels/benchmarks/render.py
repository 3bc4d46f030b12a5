"""Writes the records into the tables of kernels/README.md: `python kernels/benchmarks/render.py`.

A ratio is the median over the rounds of the time of a contestant divided by that of ours in the same round; the number
after ± is half the distance between the quartiles of those ratios.
"""

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent))  # the package, where it is not installed

from dinov3_infer.cli.bench.contest import ratios, spread  # noqa: E402

README = HERE.parent / "README.md"
RECORDS = HERE / "records"
TITLES = {
    "op": "Rotation and attention, forward",
    "mixed": "Images of 256, 512 and 1024 pixels, 60, 30 and 10 percent, in one batch",
    "backward": "Rotation and attention, forward and backward",
    "eager": "Models as users call them, from images on the host",
    "compiled": "The same beside compiled peers",
    "model": "Whole models, inference",
    "training": "A training step: forward, backward, AdamW",
}
# the baseline of a cell: the last of these that it has
OURS = ("fused", "packed", "ours", "ours, packed", "extract_features")
NOTHING = "**Nothing has been measured on a GPU yet.**\n"
COMPILED = re.compile(
    r"(?P<kernel>forward|short|key_value|query|delta|rotate|(?:residual_)?norm(?:_backward)?|swiglu|unfold)"
    r"(?P<form>[ \w]*?) +(?P<chip>sm\d+|small) +D(?P<width>\d+) +"
    r"(?P<dtype>\w+) +(?P<tile>\d+x\d+) +(?P<warps>\d) warps +(?P<stages>\d) stages: +(?P<registers>\d+) registers +"
    r"(?P<shared>\d+) KiB"
)


def baseline(cell: dict[str, Any]) -> str:
    found = [name for name in OURS if "rounds_ms" in cell["contestants"].get(name, {})]
    return found[-1] if found else ""


def lines(cell: dict[str, Any]) -> list[str]:
    """A cell as text, printed while measuring."""
    ours = cell["contestants"].get(baseline(cell), {}).get("rounds_ms")
    found = [", ".join(f"{k} {v}" for k, v in cell["cell"].items())]
    for name, entry in cell["contestants"].items():
        if "refused" in entry:
            found.append(f"  {name:36} {entry['refused']}")
            continue
        if "rounds_ms" not in entry:
            found.append(f"  {name:36} ended before it was timed")
            continue
        times = entry["rounds_ms"]
        ratio = f"{median(ratios(times, ours)):6.2f}x" if ours else ""
        found.append(
            f"  {name:36} {median(times):9.4f} ms ±{spread(times):.4f}  {_teraflops(cell, times):6.1f} TFLOP/s "
            f"{ratio}  error {entry['error']:.1e}"
        )
    return found


def _teraflops(cell: dict[str, Any], times: list[float]) -> float:
    return cell["flops"] / median(times) / 1e9 if cell["flops"] else 0.0


# --- tables --------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def comparison(record: dict[str, Any]) -> str:
    """Ours in milliseconds and TFLOP/s, everyone else as a multiple of its time."""
    cells = [cell for cell in record["cells"] if baseline(cell)]
    names = list(dict.fromkeys(name for cell in cells for name in cell["contestants"] if name != baseline(cell)))
    head = [*cells[0]["cell"], "ours, ms", "TFLOP/s", *names] if cells else []
    rows = []
    for cell in cells:
        ours = cell["contestants"][baseline(cell)]["rounds_ms"]
        row = [str(cell["cell"].get(key, "")) for key in cells[0]["cell"]]
        row += [f"{median(ours):.3f} ±{spread(ours):.3f}", f"{_teraflops(cell, ours):.0f}"]
        for name in names:
            entry = cell["contestants"].get(name, {})
            found = ratios(entry["rounds_ms"], ours) if "rounds_ms" in entry else []
            row.append(f"{median(found):.2f} ±{spread(found):.2f}" if found else "")
        rows.append(row)
    return table(head, rows) if rows else ""


def memory(record: dict[str, Any]) -> str:
    """MiB that a call allocates beyond its inputs."""
    cells = record["cells"]
    names = [n for n in dict.fromkeys(n for c in cells for n in c["contestants"]) if _peaks(cells, n)]
    rows = [
        [*(str(v) for v in c["cell"].values()), *(str(c["contestants"].get(n, {}).get("peak_mib", "")) for n in names)]
        for c in cells
    ]
    return table([*cells[0]["cell"], *names], rows) if names else ""


def _peaks(cells: list[dict[str, Any]], name: str) -> list[float]:
    return [c["contestants"][name]["peak_mib"] for c in cells if "peak_mib" in c["contestants"].get(name, {})]


def remarks(record: dict[str, Any]) -> str:
    """Largest errors, contestants that were not timed and why, and the kernels that torch's attention launched."""
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    kernels: set[str] = set()
    for cell in record["cells"]:
        for name, entry in cell["contestants"].items():
            if "error" in entry:
                errors[name] = max(entry["error"], errors.get(name, 0.0))
            if "refused" in entry:
                refused.setdefault(name, entry["refused"])
            if name in ("rotation + SDPA", "transformers"):
                kernels |= {k for k in entry.get("kernels", []) if re.search("flash|fmha|sdpa|attention", k, re.I)}
    found = ["Largest relative errors: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()) + "."]
    found += [f"Not timed: {name}: {why}." for name, why in refused.items()]
    found += [f"SDPA ran as: {', '.join(f'`{k}`' for k in sorted(kernels))}."] if kernels else []
    return "\n\n".join(found) + "\n"


def measurements(folder: Path = RECORDS) -> str:
    """The tables of all parts, in their order."""
    found = []
    for part, title in TITLES.items():
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["dry_run"]:
            raise ValueError(f"{path} is of a rehearsal; only measurements are shown")
        where = record["environment"]
        stated = [f"{key} {where[key]}" for key in ("driver", "torch", "triton", "cudnn", "transformers") if where[key]]
        found.append(
            f"### {title}\n\n{where['gpu']}, {', '.join(stated)}, commit {where['commit']}, "
            f"configurations {where['configurations']}.\n"
        )
        found += [comparison(record), remarks(record)]
        found += ["Peak memory in MiB:\n", memory(record)] if part in ("backward", "training") else []
    return "\n".join(text for text in found if text) or NOTHING


def compiled(folder: Path = RECORDS) -> str:
    """The report of ptxas for each configuration, as compile_kernels.py printed it with each Triton."""
    logs = {path.stem.removeprefix("compile-"): path.read_text() for path in sorted(folder.glob("compile-*.txt"))}
    found: dict[tuple[str, ...], dict[str, list[re.Match[str]]]] = {}
    for version, log in logs.items():
        for match in COMPILED.finditer(log):
            key = match.group("kernel", "width", "dtype", "chip", "tile", "warps", "stages")
            found.setdefault(key, {}).setdefault(version, []).append(match)
    rows = []
    for key, versions in found.items():
        row = list(key)
        for version in logs:
            for quantity in ("registers", "shared"):
                values = sorted({int(match[quantity]) for match in versions.get(version, [])})
                row.append("" if not values else f"{values[0]}-{values[-1]}" if len(values) > 1 else str(values[0]))
        rows.append(row)
    head = ["kernel", "D", "dtype", "chip", "tile", "warps", "stages"]
    return table(head + [f"{what}, {v}" for v in logs for what in ("registers", "KiB")], rows)


def executed(folder: Path = RECORDS) -> str:
    """The counts of ptx_counts.py for a head with each Triton, and the bound of the rate."""
    names = ("issue", "tensor cores", "shared memory", "L2")
    counted = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("executed-*.json"))]
    rows = [
        [str(row["tokens"]), row["tile"], row["tables"], record["triton"]]
        + [str(row[key] >> 10) for key in ("bytes", "bytes_of_tables")]
        + [str(row["instructions"]["all"]), str(row["instructions"]["loop"])]
        + [str(row["clocks"][name]) for name in names]
        + [str(row["bound"])]
        for same in zip(*(record["attention"] for record in counted), strict=True)
        for record, row in zip(counted, same, strict=True)
    ]
    head = ["tokens", "tile", "tables", "Triton", "KiB read", "of tables", "instructions", "of the loop"]
    return table([*head, "clocks: issue", *names[1:], "bound, useful TFLOP/s"], rows)


def filled(text: str, folder: Path = RECORDS) -> str:
    """The README with the tables of the records."""
    tables = (("measurements", measurements(folder)), ("compiled", compiled(folder)), ("executed", executed(folder)))
    for name, content in tables:
        between = re.compile(rf"(?<=<!-- {name} -->\n).*(?=<!-- /{name} -->)", re.DOTALL)
        if not between.search(text):
            raise ValueError(f"the README has no place for {name}")
        text = between.sub(lambda _, content=content: content, text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
