"""What a forward pass asks of a GPU, counted on fake tensors: kernels, casts, synchronisations, bytes."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from repository import ROOT

from dinov3_infer import Backbone
from dinov3_infer.model.layers import ViTConfig
from dinov3_infer.zoo import ARCHITECTURES

pytest.importorskip("triton", minversion="3.6")
SCRIPTS = ROOT / "kernels" / "benchmarks"
CONFIGS = {name: ARCHITECTURES[f"dinov3_{name}"] for name in ("vits16", "vits16plus", "vitl16", "vit7b16")}


@pytest.fixture(scope="module")
def tracing() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import tracing

        yield tracing
    finally:
        sys.path.remove(str(SCRIPTS))


def shallow(config: ViTConfig, depth: int) -> ViTConfig:
    return replace(config, depth=depth)


def of_a_block(tracing: Any, config: ViTConfig, batch: int, size: tuple[int, int], **options: Any) -> list[Any]:
    """The kernels that a block more brings: those between the first and the last norm of a pass of three blocks."""
    counts = []
    for depth in (2, 3):
        ops = tracing.ours(shallow(config, depth), batch, [size], **options)
        counts.append([op for op in ops if op.kernels])
    two, three = counts
    more = len(three) - len(two)
    start = next(i for i, op in enumerate(three) if op.name == "layer_norm") + 1
    block = three[start : start + more]
    assert three[start + more : start + 2 * more] == block  # and the next one is the same
    assert [op for op in three if op not in block][:2] == two[:2]
    return block


def ideal(config: ViTConfig, batch: int, tokens: int) -> float:
    """Bytes of a block: inputs and outputs of each kernel and weights once, the stream in float32, all else 16 bits."""
    m, c, f = batch * tokens, config.embed_dim, config.ffn_dim
    norm = m * c * (4 + 2 + 4 + 2)  # stream and branch in, stream and normed out
    wide = 2 * f if config.gated else f
    weights = 2 * (3 * c * c + c * c + wide * c + c * f)
    products = 2 * m * ((c + 3 * c) + (c + c) + (c + wide) + (f + c))
    return 2 * norm + weights + products + 2 * m * (3 * c + c) + 2 * m * (wide + f)


def names(ops: list[Any]) -> list[str]:
    return [op.name.split()[0] for op in ops]


# --- a block -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch, side", [(64, 224), (16, 384)])
def test_a_block_has_few_kernels_and_the_least_bytes(name: str, batch: int, side: int, tracing: Any) -> None:
    """Eight, or nine with SwiGLU, no cast, bytes within 5 %."""
    config = CONFIGS[name]
    block = of_a_block(tracing, config, batch, (side, side))
    assert sum(op.kernels for op in block) <= (9 if config.gated else 8), names(block)
    assert not [op.name for op in block if "cast" in op.name or op.kind in ("cast", "cat", "sync")]
    assert sum(op.bytes for op in block) <= 1.05 * ideal(config, batch, (side // 16) ** 2 + 5)
    assert {"rope_attention", "residual_norm", "swiglu" if config.gated else "gelu"} <= set(names(block))


def test_long_images_have_one_kernel_more(tracing: Any) -> None:
    """A rotation of q and k before torch's attention, above the crossover."""
    block = of_a_block(tracing, CONFIGS["vitl16"], 8, (1024, 1024))
    assert names(block).count("rope_rotate") == 1 and sum(op.kernels for op in block) == 9
    assert not [op for op in block if op.kind == "cast"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_path_as_it_is_written_fails_this(name: str, tracing: Any) -> None:
    """So the test above sees what a plan is for."""
    counts = []
    for depth in (2, 3):
        with torch.device("meta"):
            model = Backbone.from_config(shallow(CONFIGS[name], depth))
        ops = tracing.plain(model, 64, (224, 224), True, None)
        counts.append([op for op in ops if op.kernels])
    more = sum(op.kernels for op in counts[1]) - sum(op.kernels for op in counts[0])
    casts, moved = (
        [sum(amount(op) for op in ops) for ops in counts]
        for amount in (lambda op: op.kind == "cast", lambda op: op.bytes)
    )
    assert more > 20 and casts[1] - casts[0] >= 5
    assert moved[1] - moved[0] > 1.3 * ideal(CONFIGS[name], 64, 201)


# --- a pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["auto", "bfloat16"])
def test_a_pass_waits_once_at_its_end(name: str, batch: int, dtype: Any, tracing: Any) -> None:
    """One copy of uint8 from pinned memory, no cast, one number read last."""
    ops = tracing.ours(shallow(CONFIGS[name], 3), batch, [(224, 224)], dtype=dtype)
    kinds = [op.kind for op in ops]
    assert kinds.count("sync") == 1 and kinds[-1] == "sync"
    assert kinds.count("pinned") == 1 and "copy" not in kinds and "cast" not in kinds
    (copied,) = (op for op in ops if op.kind == "pinned")
    assert copied.bytes == batch * 3 * 224 * 224
    assert not [op.name for op in ops if "cast" in op.name]
    outside = [op for op in ops if op.kernels and op.kind != "pinned"]
    fixed = len(outside) - 3 * 8
    assert fixed == (6 if batch == 64 else 9), names(outside)  # a graph copies in, and results and sum out


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_of_a_whole_pass(name: str, tracing: Any) -> None:
    """Within 5 % of what its kernels cannot do without, the ends of the pass among them."""
    config, batch, patches = CONFIGS[name], 64, 196
    ops = tracing.ours(config, batch, [(224, 224)])
    m, c, side = batch * (patches + 5), config.embed_dim, 3 * config.patch_size**2
    rows = batch * patches
    entering = rows * side * (1 + 2) + 2 * (rows * (side + c) + side * c) + 4 * m * c + 2 * rows * c
    first, last, check = m * c * (4 + 2), m * c * 2, m * c * 4  # the last norm writes float32
    least = config.depth * ideal(config, batch, patches + 5) + entering + first + last + check
    assert sum(op.bytes for op in ops if op.kind != "pinned") <= 1.05 * least


def test_small_batches_are_replayed(tracing: Any) -> None:
    """The host launches a handful of kernels, whatever the depth; a large batch has no graph."""
    for batch, replayed in ((1, True), (8, True), (64, False)):
        ops = tracing.ours(CONFIGS["vits16"], batch, [(224, 224)])
        assert any(op.kind == "replay" for op in ops) is replayed
        if replayed:
            assert sum(op.kernels for op in ops if not op.replayed) <= 5


def test_several_sizes_go_in_one_pass(tracing: Any) -> None:
    """Packed: as many products as for one size, and no number is read before the end."""
    ops = tracing.ours(shallow(CONFIGS["vits16"], 3), 4, [(224, 224), (256, 192)])
    kinds = [op.kind for op in ops]
    assert kinds.count("sync") == 1 and kinds[-1] == "sync" and "copy" not in kinds
    assert names([op for op in ops if op.kernels]).count("rope_attention") == 3


def test_class_tokens_alone_leave_out_most_of_the_last_block(tracing: Any) -> None:
    """Its last three products have one row for each image."""
    whole, alone = (
        sum(op.flops for op in tracing.launched(CONFIGS["vits16"], 64, (224, 224), class_only))
        for class_only in (False, True)
    )
    assert 0.93 < alone / whole < 0.95  # 18 of 24 parts of one block of twelve


# --- the simulation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulate(tracing: Any) -> Any:
    import simulate

    return simulate


def test_the_simulation_is_called_one(simulate: Any) -> None:
    """The table that is recorded is the one that is shown, and reaches what was wanted."""
    record = json.loads(simulate.RECORD.read_text(encoding="utf-8"))
    text = simulate.README.read_text(encoding="utf-8")
    assert record["simulation"] is True
    assert simulate.filled(text, record) == text, "run python kernels/benchmarks/simulate.py"
    assert "No GPU has\nconfirmed any of these numbers" in text
    for name, found in record["training"].items():
        for recompute in ("none", "cheap"):  # the trainer uses these norms, as this says that it pays
            assert found[f"separate {recompute}"]["wall"] > found[f"fused {recompute}"]["wall"], name
    for cell, wanted in simulate.WANTED.items():
        assert simulate.ratio(record["cells"][" ".join(map(str, cell))], "transformers") >= wanted, cell


def test_the_recorded_training_is_that_of_the_code(simulate: Any) -> None:
    recorded = json.loads(simulate.RECORD.read_text(encoding="utf-8"))["training"]["S 256 64"]
    found = simulate.training("S", 256, 64)
    for how, row in recorded.items():
        assert found[how] == pytest.approx(row, rel=1e-6), f"{how}: run python kernels/benchmarks/simulate.py"


@pytest.mark.parametrize("cell", [("S", 224, 64), ("L", 224, 1)], ids=lambda cell: " ".join(map(str, cell)))
def test_the_recorded_numbers_are_those_of_the_code(cell: Any, simulate: Any) -> None:
    """As it is now: kernels and bytes of the plan and of the model as it is written, and the times made of them."""
    pytest.importorskip("transformers")
    recorded = json.loads(simulate.RECORD.read_text(encoding="utf-8"))["cells"][" ".join(map(str, cell))]
    for who in ("plan", "ours autocast", "transformers"):
        found = simulate.timeline(simulate.contestant(who, *cell))
        if who == "transformers":  # of the version that is installed
            assert found["wall"] == pytest.approx(recorded[who]["wall"], rel=0.1)
        else:
            assert found == pytest.approx(recorded[who], rel=1e-6), f"{who}: run python kernels/benchmarks/simulate.py"
