"""From the records to the figures of README and guides.

    python tests/benchmarks/figures.py      # writes every figure that differs from its record

On a page a figure stands between `<!-- NAME -->` and `<!-- /NAME -->`: some words in a line, or a table.  NAME is a key
of FIGURES, whose function makes the text from a record, or from the code that the figure is about.
tests/end_to_end/test_readme.py fails where a page shows anything else.  kernels/README.md has its own figures, in
kernels/benchmarks/render.py.
"""

import importlib.util
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dinov3_infer import Backbone, ConvNeXtConfig
from dinov3_infer.model import dispatch, trial
from dinov3_infer.zoo import MODELS, ModelInfo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md"))]
MARK = re.compile(r"<!-- (?P<name>[\w-]+) -->(?P<shown>.*?)<!-- /(?P=name) -->", re.DOTALL)


@cache
def record(name: str) -> Any:
    return json.loads((HERE / "records" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def script(path: str) -> ModuleType:
    """A benchmark as a module, for the table that it makes of its record."""
    spec = importlib.util.spec_from_file_location(f"figures_of_{Path(path).stem}", HERE / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return block("\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]))


def block(text: str) -> str:
    return f"\n{text.strip()}\n"


def between(values: Iterable[float], digits: int) -> str:
    found = sorted(values)
    return f"{found[0]:.{digits}f} to {found[-1]:.{digits}f}"


# --- models --------------------------------------------------------------------------------------------------------

FAMILIES = {"dinov3": "DINOv3", "dinov2": "DINOv2", "dino": "DINO", "lingbot": "LingBot-Vision", "eupe": "EUPE"}


@cache
def on_meta(info: ModelInfo) -> Any:
    with torch.device("meta"):
        return Backbone(info.config)


def millions(info: ModelInfo) -> float:
    return sum(p.numel() for p in on_meta(info).parameters()) / 1e6  # type: ignore[no-any-return]


def models() -> str:
    """A row for each model."""
    head = ["name", "width", "blocks", "patch", "registers", "parameters", "weights", "licence"]
    rows = []
    for info in MODELS.values():
        model, c = on_meta(info), info.config
        blocks = "+".join(map(str, c.depths)) if isinstance(c, ConvNeXtConfig) else str(c.depth)
        home = f"`{info.hub_id or info.timm_id}`" if info.hub_id or info.timm_id else "in this package"
        rows.append([
            f"`{info.name}`", str(model.embed_dim), blocks, str(model.patch_size), str(model.num_register_tokens),
            f"{millions(info):,.1f} M", home, info.licence,
        ])  # fmt: skip
    return table(head, rows)


def families() -> str:
    """A row for the models of a family that have one kind of network and one licence."""
    groups: dict[tuple[str, str, str], list[ModelInfo]] = {}
    for info in MODELS.values():
        kind = "ConvNeXt" if isinstance(info.config, ConvNeXtConfig) else "ViT"
        family = f"{FAMILIES[info.family]} {kind}" if info.name != "nano" else "`nano`, part of the package"
        groups.setdefault((family, kind, info.licence), []).append(info)
    rows = []
    for (family, kind, licence), infos in groups.items():
        patches = sorted({on_meta(info).patch_size for info in infos})
        stride = "stride 32" if kind == "ConvNeXt" else " or ".join(map(str, patches))
        sizes = [millions(info) for info in infos]
        shown = f"{min(sizes):,.0f} to {max(sizes):,.0f} M" if len(infos) > 1 else f"{sizes[0]:,.1f} M"
        rows.append([family, " ".join(f"`{info.name}`" for info in infos), stride, shown, licence])
    return table(["family", "names", "patch", "parameters", "licence of the weights"], rows)


def nano_size() -> str:
    weights = ROOT / "dinov3_infer" / "data" / "nano" / "model.safetensors"
    return f"{millions(MODELS['nano']):.1f} M parameters ({weights.stat().st_size / 1e6:.1f} MB)"


def dropin() -> str:
    text = (ROOT / "tests" / "end_to_end" / "test_other_projects.py").read_text(encoding="utf-8")
    found = re.search(r"^SERVED, PATTERNS = (\d+), (\d+)$", text, re.MULTILINE)
    assert found is not None
    return f"{found[1]} of {found[2]}"


# --- speed ---------------------------------------------------------------------------------------------------------


def contest() -> str:
    return block(script("cpu.py").table(record("cpu")))


def cpu_float32() -> str:
    rivals = ("float32, transformers", "float32, timm")
    return between((cell["results"][rival]["ratio"] for cell in record("cpu")["cells"] for rival in rivals), 1)


def cpu_machine() -> str:
    found = record("cpu")
    cpu, versions = found["machine"], found["versions"]
    shown = ", ".join(
        f"{name} {versions[name].split('+')[0]}" for name in ("torch", "transformers", "timm", "openvino")
    )
    return f"{cpu['cpu']}, {cpu['cores']} cores, {shown}, {found['rounds']} rounds"


def cold_start(what: str) -> str:
    found = record("cold_start")["results"]
    return between((row["median"] for name, row in found.items() if f" {what}: " in name and "wall_s" in name), 2)


def throughput() -> str:
    libraries = ("transformers pipeline", "DataLoader + transformers", "timm")
    rows = []
    for name, cell in record("embed_throughput")["cells"].items():
        found, size = cell["seconds"], name.replace("MP", "megapixels").replace("px", "pixels")
        for decode, ratios in (("exact", found["theirs_over_ours"]), ("fast", found["theirs_over_ours_fast"])):
            bound = f"{found['ours_over_bound']:.2f}" if decode == "exact" else ""
            rows.append([f"{cell['count']:,} JPEGs of {size}", f'`decode="{decode}"`', bound])
            rows[-1] += [f"{ratios[library]:.1f}" for library in libraries]
    return table(["images", "", "ours / lower bound", *(f"{library} / ours" for library in libraries)], rows)


def train_step() -> str:
    rows = []
    for dtype in ("float32", "bfloat16"):
        found = record(f"train_step_cpu_{dtype}")
        seconds, memory = found["seconds"], found["peak_mib"]
        rows.append([dtype, f"{seconds['ours']:.1f} s", f"{found['speed_ratio']['median']:.2f}",
                     f"{memory['ours']:,.0f} MiB", f"{found['memory_ratio']:.2f}"])  # fmt: skip
    return table(["dtype", "a step", "times as fast", "peak memory", "of theirs"], rows)


# --- files ---------------------------------------------------------------------------------------------------------


def embed_kill() -> str:
    found = record("embed_kill")
    if not (found["equal"] and found["every_input_once"]):
        raise ValueError("the record says that the bytes differ; the page has to say so")
    return f"{found['pictures']:,} files ({found['failed']} broken) that was killed {found['kills']} times"


def embed_memory() -> str:
    found = record("embed_memory")
    (few, many), (low, high) = found["counts"], found["peak_bytes"]
    return f"{low / 1e6:.0f} MB for {few:,} images and {high / 1e6:.0f} MB for {many:,} with `{found['model']}`"


def train_kill() -> str:
    found = record("train_kill")
    if not found["same_weights"]:
        raise ValueError("the record says that the weights differ; the page has to say so")
    return f"{found['kills']} times in {found['steps']} steps"


def at_default() -> dict[str, Any]:
    """The row of dedup's default threshold."""
    rows = record("curation")["dedup"]["class token"]
    return next(row for row in rows if row["threshold"] == 0.75)  # type: ignore[no-any-return]


def dedup() -> str:
    found = record("curation")
    return f"{at_default()['recall']:.1%} of {found['planted']} copies among {found['pictures']:,} images"


def dedup_right() -> str:
    return f"{at_default()['precision']:.1%}"


def curation() -> str:
    found = record("curation")["balance"]
    default = {variant["vectors"]: variant["mean"] for variant in found["variants"]
               if variant["change"] == "as they are" and len(variant["clusters"]) == 2}  # fmt: skip
    rows = [["drawn at random", *(f"{statistics.mean(found['random'][n]):.2f}" for n in ("100", "500"))]]
    for vectors, mean in default.items():
        rows.append(
            [f"balanced by {'the ' * (vectors != 'both')}{vectors}", f"{mean['100']:.2f}", f"{mean['500']:.2f}"]
        )
    return table(["sample", "100 images", "500 images"], rows)


# --- training ------------------------------------------------------------------------------------------------------


def adaptation() -> str:
    found = record("adaptation")
    head = ["", "20-NN", "linear probe", "one-shot IoU, same thing", "one-shot IoU, same kind"]
    rows = []
    for name, run in (("before", "start"), ("after", "plain"), ("after, with `--gram start`", "gram")):
        cifar, iou = found[run]["cifar10"]["6000/3000"], found[run]["iou"]
        cells = [cifar["knn"], cifar["linear"], iou["thing"]["prototype"], iou["kind"]["prototype"]]
        rows.append([name, *(f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in cells)])
    return table(head, rows)


def from_scratch() -> str:
    found = record("from_scratch")
    columns = {"random": "random weights", "pixels": "raw pixels", "lightly": "lightly's DINO",
               "ours": "`dinov3_infer.train`"}  # fmt: skip
    values = [found[name]["knn"] for name in columns]
    return table(
        ["", *columns.values()], [["20-NN", *(f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in values)]]
    )


def minutes(name: str, *path: str) -> str:
    found = record(name)
    for key in path:
        found = found[key]
    return f"{found['minutes']:.0f} minutes"


# --- the rest ------------------------------------------------------------------------------------------------------


def explore() -> str:
    found = record("explore")
    rows = []
    for row in found["rows"]:
        model = row["model"].split(" (")[0]
        hover = row["hover_ms"]
        rows.append([
            f"`{model}`, {row['width']} numbers", f"{row['patches']:,}", f"{row['bytes_without_images'] / 1e6:.1f} MB",
            f"{row['largest_error']:.4f}", f"{hover['median']:.0f} and {hover['max']:.0f} ms",
        ])  # fmt: skip
    return table(
        [f"model, {found['images']} square images of {found['side']} pixels", "patches", "page without the images",
         "largest error of a cosine, all pairs", "from a new patch to the colours, median and longest"], rows,
    )  # fmt: skip


def fast_least() -> str:
    """What tests/end_to_end/test_real_weights.py asks of mode="fast"."""
    text = (ROOT / "tests" / "end_to_end" / "test_real_weights.py").read_text(encoding="utf-8")
    found = re.search(r'"fast": \((0\.\d+), (0\.\d+)\)', text)
    assert found is not None
    return cosines((float(found[1]), float(found[2])))


def cosines(least: tuple[float, float]) -> str:
    return f"{least[0]} for class tokens (mean) and {least[1]} for patches (1st percentile)"


FIGURES: dict[str, Callable[[], str]] = {
    "models": models,
    "families": families,
    "nano-size": nano_size,
    "dropin": dropin,
    "contest": contest,
    "cpu-float32": cpu_float32,
    "cpu-machine": cpu_machine,
    "cold-start": lambda: cold_start("picture"),
    "cold-start-compiling": lambda: cold_start("new machine"),
    "throughput": throughput,
    "train-step": train_step,
    "embed-kill": embed_kill,
    "embed-memory": embed_memory,
    "train-kill": train_kill,
    "dedup": dedup,
    "dedup-right": dedup_right,
    "curation": curation,
    "adaptation": adaptation,
    "adaptation-minutes": lambda: minutes("adaptation", "plain"),
    "adaptation-gram-minutes": lambda: minutes("adaptation", "gram"),
    "from-scratch": from_scratch,
    "from-scratch-minutes": lambda: minutes("from_scratch", "ours"),
    "explore": explore,
    "fast-least": fast_least,
    "int8-least": lambda: cosines(dispatch._LEAST),
    "gpu-least": lambda: cosines(trial.LEAST["exact"]),
    "classification": lambda: block(script("choosing.py").classification_table(script("choosing.py").recorded())),
    "segmentation": lambda: block(script("choosing.py").segmentation_table(script("choosing.py").recorded())),
    "results": lambda: block(script("tasks/run.py").table(record("tasks"))),
}


def filled(text: str) -> str:
    """A page with its figures as the records have them.  Raises: KeyError for a mark that FIGURES does not have."""
    return MARK.sub(lambda found: f"<!-- {found['name']} -->{FIGURES[found['name']]()}<!-- /{found['name']} -->", text)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
