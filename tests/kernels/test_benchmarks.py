"""The benchmarks of the kernel: all of them run, wrong contestants are not timed, the README shows the records."""

import importlib
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

from dinov3_infer import Backbone
from dinov3_infer.cli.bench.contest import Settings

SCRIPTS = ROOT / "kernels" / "benchmarks"
LACKING = {"rotation + cuDNN", "rotation + efficient", "packed, rotation + varlen flash"}  # on a CPU


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """Imports a script by name; they are no package."""
    sys.path.insert(0, str(SCRIPTS))
    sys.modules.pop("run", None)  # of other benchmarks
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(SCRIPTS))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "run.py", *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=1800)


# --- the README ----------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_records_and_nothing_else(scripts: Any) -> None:
    render = scripts("render")
    text = render.README.read_text(encoding="utf-8")
    assert render.filled(text) == text, "run python kernels/benchmarks/render.py"
    measured = any((render.RECORDS / f"{part}.json").exists() for part in render.TITLES)
    assert (render.NOTHING in text) is ("No GPU has run it yet" in text) is not measured


def test_what_the_compiler_said_is_of_the_shipped_configurations(scripts: Any) -> None:
    """Both ways, for each version of Triton."""
    configs = pytest.importorskip("dinov3_infer_kernels.gpu").configs
    render = scripts("render")
    if configs.unfenced(importlib.metadata.version("triton")):
        pytest.skip("the table of this Triton is not that of newer ones")
    logs = sorted(render.RECORDS.glob("compile-*.txt"))
    assert len(logs) == 2
    for path in logs:
        unfenced = configs.unfenced(path.stem.partition("-")[2])
        table = configs.fenced(configs.TABLE) if unfenced else configs.TABLE
        expected = {
            (kind, str(width), size, chip, f"{c.block_m}x{c.block_n}", str(c.warps), str(c.stages))
            for (kind, width, size), chips in table.items() for chip, rows in chips.items() for _, c in rows
        }  # fmt: skip
        matches = render.COMPILED.finditer(path.read_text(encoding="utf-8"))
        found = {m.group("kernel", "width", "dtype", "chip", "tile", "warps", "stages") for m in matches}
        found = {(*key[:2], 4 if key[2] == "float32" else 2, *key[3:]) for key in found}
        assert {key for key in found if key[0] in {kind for kind, *_ in expected}} == expected, (
            f"run python tests/support/compile_kernels.py > {path.relative_to(ROOT)} with that version of Triton"
        )


def test_what_was_executed_is_what_is_shipped(scripts: Any) -> None:
    """The counted tiles are those of the table, and 256 pixels are no longer bound by what the kernel reads."""
    configs = pytest.importorskip("dinov3_infer_kernels.gpu").configs
    records = sorted(scripts("render").RECORDS.glob("executed-*.json"))
    assert [path.stem.partition("-")[2] for path in records] == ["3.6.0", "3.9.0"]
    for path in records:
        _judge(json.loads(path.read_text(encoding="utf-8"))["attention"], configs)


def _judge(rows: list[dict[str, Any]], configs: Any) -> None:
    bounds = {(row["tokens"], row["tile"], row["tables"]): row["bound"] for row in rows}
    for tokens in (201, 261, 1029):
        shipped = next(c for limit, c in configs.TABLE["forward", 64, 2]["sm90"] if tokens <= limit)
        whole = [c for limit, c in configs.SHORT["sm90"] if tokens <= limit]
        tiles = {f"{shipped.block_m}x{shipped.block_n}", *(["one program a head"] if whole else [])}
        assert {tile for count, tile, _ in bounds if count == tokens} == tiles, (
            "run python tests/support/ptx_counts.py --save"
        )
    assert min(bound for (tokens, _, tables), bound in bounds.items() if tokens == 261 and tables == "float16") >= 260
    assert all(row["error"][0] <= 2 * row["error"][1] for row in rows)


def test_tables_of_a_record(scripts: Any, tmp_path: Path) -> None:
    """Ratios are medians of per-round ratios, not ratios of medians; who was not timed is named with the reason."""
    render = scripts("render")
    times = {"fused": [1.0, 2.0, 4.0], "transformers": [3.0, 2.0, 8.0]}
    contestants: dict[str, Any] = {n: {"rounds_ms": t, "error": 0.001, "kernels": []} for n, t in times.items()}
    contestants["timm"] = {"refused": "wrong: error 0.5, 0.02 is allowed", "error": 0.5}
    contestants["rotation + SDPA"] = {"rounds_ms": [1.0, 1.0, 1.0], "error": 0.001, "kernels": ["cudnn_fmha_sm90"]}
    cell = {"cell": {"tokens": 261, "width": 64}, "flops": 8e9, "contestants": contestants}
    where = dict.fromkeys(("driver", "torch", "triton", "cudnn", "transformers", "commit"), "1") | {"gpu": "H200"}
    record = {"part": "op", "dry_run": False, "environment": where | {"configurations": "shipped"}, "cells": [cell]}
    (tmp_path / "op.json").write_text(json.dumps(record))
    text = render.measurements(tmp_path)
    assert "| 261 | 64 | 2.000 ±0.750 | 4 | 2.00 ±0.50 |  | 0.50 ±0.19 |" in text
    assert "Not timed: timm: wrong: error 0.5" in text and "`cudnn_fmha_sm90`" in text
    (tmp_path / "op.json").write_text(json.dumps(record | {"dry_run": True}))
    with pytest.raises(ValueError, match="rehearsal"):
        render.measurements(tmp_path)


# --- the method ----------------------------------------------------------------------------------------------------


def test_a_wrong_contestant_is_reported_and_not_timed(scripts: Any) -> None:
    measure = scripts("measure")
    x = torch.randn(100)

    def fails(_: Any) -> Any:
        raise NotImplementedError("no such\nkernel")

    calls = {
        "right": lambda x: x * 2,
        "wrong": lambda x: x * 2.5,
        "nan": lambda x: x * float("nan"),
        "shape": lambda x: x[:1] * 2,
        "fails": fails,
    }
    cell = measure.Cell({"n": 100}, [x, x + 1], calls, lambda out: measure.relative_error(out, 2 * x), 1e-3, 200.0)
    found = measure.contest(cell, Settings(torch.device("cpu"), rounds=3, least_ms=0.0))["contestants"]
    assert len(found["right"]["rounds_ms"]) == 3 and found["right"]["error"] == 0.0
    assert [name for name, entry in found.items() if "rounds_ms" in entry] == ["right"]
    assert "error 0.25" in found["wrong"]["refused"] and found["fails"]["refused"] == "NotImplementedError: no such"


def test_inputs_rotate_through_three_times_the_cache(scripts: Any) -> None:
    assert [scripts("measure").copies(size << 20) for size in (1, 50, 100, 4000)] == [12, 4, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["op", "sideways"], "got sideways"), (["--dry-run"], "give --out"), (["--rounds", "3"], "unrecognized")],
    ids=["part", "rehearsal", "option"],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_the_record_grows_with_each_contestant_and_round(scripts: Any) -> None:
    """What it holds at any moment is what is done by then: nothing waits for the end of a cell."""
    measure = scripts("measure")
    seen: list[dict[str, Any]] = []
    calls = {name: (lambda x: x * 2) for name in ("first", "second", "third")}
    x = torch.randn(100)
    cell = measure.Cell({"n": 100}, [x], calls, lambda out: measure.relative_error(out, 2 * x), 1e-3, 200.0)
    settings = Settings(torch.device("cpu"), rounds=3, least_ms=0.0)
    whole = measure.contest(cell, settings, lambda found: seen.append(json.loads(json.dumps(found))))
    names = [list(found["contestants"]) for found in seen]
    assert names[:3] == [["first"], ["first", "second"], ["first", "second", "third"]]
    rounds = [len(found["contestants"]["third"].get("rounds_ms", [])) for found in seen[2:]]
    assert sorted(set(rounds)) == [0, 1, 2, 3] and rounds == sorted(rounds)
    entry = whole["contestants"]["second"]
    assert entry["alone_ms"] > 0 and entry["host_ms"] > 0 and entry["kernel_count"] >= 1 and entry["error"] == 0.0


def test_the_short_run_fits(scripts: Any) -> None:
    """560 seconds, models before what compiles, and predictions for every cell of them."""
    run, users = scripts("run"), scripts("users")
    assert sum(run.SHORT.values()) <= 550 and list(run.SHORT)[-2:] == ["tune", "compiled"]
    for name, size, batch in users.EAGER:
        assert set(users.predictions(name, size, batch)) == set(users.PREDICTED)


# --- all of it -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_everything_runs_on_a_cpu(scripts: Any, tmp_path: Path) -> None:
    """Every part, tiny; all contestants that a CPU has are right, and a second run finds nothing left to do."""
    Backbone.from_config("nano", seed=0).save_pretrained(tmp_path / "weights")
    out = tmp_path / "out"
    done = run("--dry-run", "--out", out, "--weights", tmp_path / "weights")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(records) == {"weights", "tune", "op", "mixed", "backward", "model", "training"}
    for part in records.keys() & scripts("render").TITLES.keys():
        for cell in records[part]["cells"]:
            entries = cell["contestants"]
            refused = {name: entry["refused"] for name, entry in entries.items() if "refused" in entry}
            assert not [why for why in refused.values() if why.startswith("wrong")], refused
            assert set(refused) <= LACKING, refused
            assert all(len(entry["rounds_ms"]) == 2 for name, entry in entries.items() if name not in refused)
    assert records["tune"]["cells"][0]["rows"] and "crossover" in records["tune"]["cells"][-1]
    assert all(row["patch_tokens"] > 0.999999 for row in records["weights"]["cells"])
    assert records["op"]["environment"]["configurations"] == "as tuned in the same run"
    before = {path: path.read_bytes() for path in out.glob("op.json")}
    assert run("--dry-run", "--out", out, "op").returncode == 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_a_run_that_is_killed_keeps_what_was_done(tmp_path: Path) -> None:
    """At random moments: every contestant that was said to be kept is in the record, which can be read, and goes on."""
    draw, kept_at_all = random.Random(0), 0
    for attempt in range(4):
        out = tmp_path / str(attempt % 2)  # some begin anew, some go on with what was killed before
        command = [sys.executable, str(SCRIPTS / "run.py"), "--dry-run", "--short", "--out", str(out)]
        command += ["--part", "eager", "--deadline", "300"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            lines: list[str] = []
            reader = threading.Thread(target=lines.extend, args=(process.stdout,))
            reader.start()
            for _ in range(600):  # until it measures, and then for a while
                if any(line.startswith("kept") for line in lines) or process.poll() is not None:
                    break
                time.sleep(0.1)
            time.sleep(draw.uniform(0.0, 5.0))
            process.kill()
            reader.join()
        said = [json.loads(line.partition(": ")[2]) for line in lines if line.startswith("kept")]
        record = json.loads((out / "eager.json").read_text())
        for cell, name in said:
            (entry,) = (c["contestants"][name] for c in record["cells"] if c["cell"] == cell)
            assert "alone_ms" in entry or "refused" in entry
        kept_at_all += len(said)
        whole = [line for line in lines if line.startswith("model ")]
        assert sum(cell["whole"] for cell in record["cells"]) >= len(whole)
    assert kept_at_all >= 4
    assert run("--dry-run", "--short", "--out", tmp_path / "0", "eager").returncode == 0
    record = json.loads((tmp_path / "0" / "eager.json").read_text())
    assert len(record["cells"]) == 2 and all(cell["whole"] for cell in record["cells"])
    assert all(len(e["rounds_ms"]) == 2 for cell in record["cells"] for e in cell["contestants"].values())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_the_short_run_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every part of it, with `extract_features` by its plan among the contestants."""
    done = run("--dry-run", "--short", "--out", tmp_path, "--deadline", "1500")  # other processes may be busy
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(records) == {"ceilings", "eager", "op", "tune", "compiled"}
    for part in ("eager", "compiled"):
        for cell in records[part]["cells"]:
            assert cell["whole"] and "extract_features" in cell["contestants"] and len(cell["contestants"]) >= 3
            assert not [e for e in cell["contestants"].values() if "refused" in e]
    assert all(value > 0 for value in records["ceilings"]["cells"][0].values())
