"""Exported files compute what the model computes, at every size that they accept."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import refused, run, small_model
from oracles import SMALL, pixels_of, randomise, worst_token
from torch import Tensor

from dinov3_infer import Backbone, InputError, MissingFileError, PrecisionError, UnsupportedError, ViTConfig
from dinov3_infer.checkpoints import export as module
from dinov3_infer.checkpoints.export_graph import bicubic
from dinov3_infer.model.network import BackboneOutput
from dinov3_infer.model.positions import resize_positions
from dinov3_infer.zoo import ARCHITECTURES

CLOSE = 2e-5  # of the worst token, in float32; 1e-6 measured
ONE_BLOCK = {name: replace(config, depth=1) for name, config in SMALL.items()}
ONE_BLOCK["dinov2_offset"] = replace(ONE_BLOCK["dinov2"], position_resize="offset")
PT2 = ("dinov3", "dinov2_offset")


def made(name: str | ViTConfig) -> Backbone:
    return randomise(Backbone(ONE_BLOCK[name] if isinstance(name, str) else name))  # type: ignore[return-value]


def with_onnx(*others: str) -> None:
    for name in ("onnxscript", "onnxruntime", *others):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'dinov3-infer[onnx]'")


def opened(path: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """The file, opened by its own engine."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()  # type: ignore[return-value]
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    run_it = lambda pixels: map(torch.from_numpy, session.run(names, {"pixel_values": pixels.numpy()}))  # noqa: E731
    return lambda pixels: dict(zip(names, run_it(pixels), strict=True))


def axes_of(value: Any) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def assert_same(found: dict[str, Tensor], model: Backbone, pixels: Tensor, limit: float = CLOSE) -> None:
    """Every output exists, is float32, and equals the model's."""
    with torch.no_grad():
        expected: BackboneOutput = model(pixels)
    names = {"cls_token", "patch_tokens"} | ({"register_tokens"} if model.num_register_tokens else set())
    assert set(found) == names
    for name in names:
        assert found[name].dtype == torch.float32 and found[name].shape == getattr(expected, name).shape
        assert worst_token(found[name], getattr(expected, name)) <= limit, name


# What is written


@pytest.mark.parametrize("name", PT2)
def test_a_program_for_one_size(name: str, tmp_path: Path) -> None:
    """The batch size is free, and all operators are torch's, so that the file runs without this package."""
    bb = made(name)
    path = bb.export(tmp_path / "m.pt2", size=(3 * bb.patch_size, 4 * bb.patch_size))
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    program = torch.export.load(path)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and all(target.startswith(("aten.", "<built-in function getitem>")) for target in called)
    assert not any("cos" in target or "upsample" in target for target in called)  # tables are constants
    for batch in (1, 2, 5):
        pixels = pixels_of(bb.config, (3, 4), batch)
        assert_same(program.module()(pixels), bb, pixels)


@pytest.mark.parametrize("name", PT2)
def test_a_program_for_every_size(name: str, tmp_path: Path) -> None:
    """Unseen sizes work, including the size of the position table; other sizes are refused."""
    bb = made(name)
    run_file = opened(bb.export(tmp_path / "m.pt2", dynamic=True, size=4 * bb.patch_size))
    for grid in ((5, 5), (2, 9), (16, 3), (37, 2)):
        pixels = pixels_of(bb.config, grid, 1 + grid[0] % 2)
        assert_same(run_file(pixels), bb, pixels)
    with pytest.raises((AssertionError, RuntimeError)):
        run_file(torch.zeros(1, 3, 5 * bb.patch_size + 1, 5 * bb.patch_size))


def test_facts_lie_in_the_file(tmp_path: Path) -> None:
    """The file holds the mean, the std and the licence of the weights."""
    bb = Backbone.from_pretrained(small_model(), device="cpu")
    extra = {"dinov3_infer.json": ""}
    torch.export.load(bb.export(tmp_path / "m.pt2", size=32), extra_files=extra)
    facts = json.loads(extra["dinov3_infer.json"])
    assert facts["architecture"] == "nano" and facts["licence_of_the_weights"] == "Apache-2.0"
    assert json.loads(facts["preprocess"])["size"] == 256 and facts["weights"] == "nano"
    assert json.loads(facts["mean"]) == list(bb.preprocess.mean) and json.loads(facts["std"]) == list(bb.preprocess.std)


@pytest.mark.peers
@pytest.mark.parametrize("name", [*ONE_BLOCK])
def test_onnx_of_every_family(name: str, tmp_path: Path) -> None:
    """For one size the tables are constants; only ONNX operators, no control flow, one input, named axes."""
    with_onnx()
    import onnx

    bb = made(name)
    p = bb.patch_size
    path = bb.export(tmp_path / "m.onnx", size=(3 * p, 4 * p))
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18 and len(model.opset_import) == 1
    assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan", "Sin", "Cos", "Resize", "Range"}
    (given,) = model.graph.input
    assert (given.name, axes_of(given)) == ("pixel_values", ["batch", 3, 3 * p, 4 * p])
    assert b".py" not in path.read_bytes()  # nor where in whose source something came from
    engine = opened(path)
    for batch in (1, 3):
        pixels = pixels_of(bb.config, (3, 4), batch)
        assert_same(engine(pixels), bb, pixels)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["dinov3", "dinov2_offset", "dinov2_reg"])
def test_onnx_for_every_size(name: str, tmp_path: Path) -> None:
    """Learned positions work too; a size of no whole patches is an error of the engine, and not cropped silently."""
    with_onnx()
    import onnx

    bb = made(name)
    path = bb.export(tmp_path / "m.onnx", dynamic=True, size=4 * bb.patch_size)
    graph = onnx.load(path).graph
    assert not {node.op_type for node in graph.node} & {"If", "Loop", "Scan", "Resize"}
    axes = {part.name: axes_of(part) for part in graph.output}
    assert axes["patch_tokens"] == ["batch", "patches", 64] and axes["cls_token"] == ["batch", 64]
    engine = opened(path)
    for grid in ((5, 5), (2, 9), (16, 3), (37, 2)):
        pixels = pixels_of(bb.config, grid, 1 + grid[0] % 2)
        assert_same(engine(pixels), bb, pixels)
    with pytest.raises(Exception, match="(?i)reshape"):
        engine(torch.zeros(1, 3, 5 * bb.patch_size + 1, 5 * bb.patch_size))


@pytest.mark.peers
@pytest.mark.parametrize("opset", [20, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    with_onnx()
    import onnx

    bb = made("dinov3")
    path = bb.export(tmp_path / "m.onnx", size=48, opset=opset, dynamic=False)
    model = onnx.load(path)
    assert model.opset_import[0].version == opset
    assert axes_of(model.graph.input[0]) == [1, 3, 48, 48]
    assert ("Attention" in {node.op_type for node in model.graph.node}) is (opset == 23)


@pytest.mark.peers
def test_many_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_onnx()
    monkeypatch.setattr(module, "_ONE_FILE", 0)
    bb = made("dinov3")
    path = bb.export(tmp_path / "m.onnx", size=32)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert path.stat().st_size < (tmp_path / "m.onnx.data").stat().st_size
    pixels = pixels_of(bb.config, (2, 2))
    assert_same(opened(path)(pixels), bb, pixels)


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [(torch.bfloat16, "pt2"), pytest.param(torch.float16, "onnx", marks=pytest.mark.peers)],
    ids=["bfloat16-pt2", "float16-onnx"],
)
def test_half_precision(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    """Weights are stored in half precision; the stream and the outputs are float32."""
    if suffix == "onnx":
        with_onnx()
    bb = made("dinov3")
    whole = bb.export(tmp_path / f"whole.{suffix}", size=32).stat().st_size
    bb.to(dtype)
    path = bb.export(tmp_path / f"m.{suffix}", size=32)
    assert path.stat().st_size < 0.75 * whole
    pixels = pixels_of(bb.config, (2, 2))
    assert_same(opened(path)(pixels), bb, pixels, limit=module.LIMITS[dtype])


@pytest.mark.parametrize("rule", ["offset", "size", "antialias"])
@pytest.mark.parametrize("grid", [(1, 1), (5, 5), (5, 9), (3, 4), (2, 16), (11, 24)], ids=str)
def test_positions_as_products(rule: Any, grid: tuple[int, int]) -> None:
    """The products equal torch's resizing for smaller and larger grids, and the table itself on its own grid."""
    table = torch.randn(1, 25, 8)
    rows, columns = bicubic(5, grid, rule)
    found = torch.einsum("hi, wj, ijc -> hwc", rows, columns, table[0].unflatten(0, (5, 5))).flatten(0, 1)[None]
    assert worst_token(found, resize_positions(table, grid, rule)) <= 1e-5


# The check


def test_a_token_of_nothing_hides_no_other() -> None:
    """A zero token does not give 0/0, which no limit would catch."""
    theirs = torch.randn(2, 3, 8).index_fill_(0, torch.tensor(0), 0.0)
    found = [module.worst_token(factor * theirs, theirs) for factor in (1, 2)]
    assert found == [0.0, pytest.approx(1.0)] and module.worst_token(theirs, theirs / 0) == float("inf")


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make exports rotate by other angles than the model."""
    program = module.program

    def wrong(traced: Any, *rest: Any) -> Any:
        traced.cos.mul_(0.9)
        return program(traced, *rest)

    monkeypatch.setattr(module, "program", wrong)


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.peers)])
def test_a_file_that_fails_keeps_another_name(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier file of that name stays, with its weights."""
    if suffix == "onnx":
        with_onnx()
        monkeypatch.setattr(module, "_ONE_FILE", 0)
    bb = made("dinov3")
    path = bb.export(tmp_path / f"m.{suffix}", size=32)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    spoil(monkeypatch)
    with pytest.raises(PrecisionError, match=rf"off by .* is allowed; the file is kept as '.*m\.{suffix}\.failed'"):
        bb.export(path, size=32)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(after) == set(before) | {name.replace(suffix, f"{suffix}.failed") for name in before}
    assert {name: after[name] for name in before} == before


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    bb = made("dinov3")
    model, out = bb.save_pretrained(tmp_path / "model"), folder / "m.pt2"
    done = run("export", model, out, "--size", "32x48", "--fixed")
    assert done.status == 0 and done.out == "" and "its input is (RGB in 0..1 - [0.485, 0.456, 0.406])" in done.err
    pixels = pixels_of(bb.config, (2, 3))
    assert_same(opened(out)(pixels), bb, pixels)
    refused(1, "exists already", "export", model, out)
    refused(1, "the nearest is 32x32", "export", model, folder / "n.pt2", "--size", "33")
    refused(1, r"should end in \.onnx or \.pt2", "export", model, folder / "m.engine")
    refused(2, "not allowed with", "export", model, out, "--fixed", "--dynamic")
    refused(2, "a size is SIDE or HEIGHTxWIDTH in pixels", "export", model, out, "--size", "own")
    spoil(monkeypatch)
    refused(1, "is kept as", "export", model, folder / "n.pt2", "--size", "32")
    assert {file.name for file in folder.iterdir()} == {"m.pt2", "n.pt2.failed"}


def test_the_model_stays_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bb = made("dinov3").train()
    before = {name: (id(p), p.requires_grad, p._version) for name, p in bb.named_parameters()}
    attend = bb.blocks[0].attn.attend
    with caplog.at_level(logging.INFO, "dinov3_infer"):
        bb.export(tmp_path / "m.pt2", size=32)
    assert "its tokens are within" in caplog.text
    assert {name: (id(p), p.requires_grad, p._version) for name, p in bb.named_parameters()} == before
    assert bb.training and bb.blocks[0].attn.attend is attend and "rope" not in vars(bb)


@pytest.mark.parametrize(
    ("path", "options", "error", "words"),
    [
        ("m.tflite", {}, InputError, r"should end in \.onnx or \.pt2"),
        ("m.pt2", {"size": 33}, InputError, "33x33 is not a multiple of the patch size 16; the nearest is 32x32"),
        ("m.pt2", {"size": 0}, InputError, "got 0"),
        ("m.pt2", {"dynamic": "size"}, InputError, "got 'size'"),
        ("m.onnx", {"opset": 17}, UnsupportedError, "opset 17 cannot be written; give 18 to 23"),
        ("none/m.pt2", {"size": 32}, MissingFileError, "no folder '.*none'"),
    ],
    ids=["suffix", "size", "zero", "dynamic", "opset", "folder"],
)
def test_what_cannot_be_written(
    path: str, options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        made("dinov3").export(tmp_path / path, **options)
    assert not any(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bb = made("dinov3")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"needs onnx, which is not installed; pip install '.*\[onnx\]'"):
        bb.export(tmp_path / "m.onnx", size=32)
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    with pytest.raises(UnsupportedError, match="bfloat16 cannot be checked as '.onnx'"):
        bb.bfloat16().export(tmp_path / "m.onnx", size=32)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", ["batch", True], ids=["one-size", "every-size"])
@pytest.mark.parametrize(
    "name", ["dinov3_vits16", "dinov3_vits16plus", "dinov2_vitg14", "dinov2_vits14_reg", "dino_vits8", "lingbot_vitg16"]
)
def test_published_shapes(name: str, dynamic: Any, tmp_path: Path) -> None:
    """Full width and two blocks; the export checks itself, and the test checks another size."""
    with_onnx()
    bb = made(replace(ARCHITECTURES[name], depth=2))
    engine = opened(bb.export(tmp_path / "m.onnx", dynamic=dynamic))
    side = bb.preprocess.size
    assert isinstance(side, int)
    pixels = pixels_of(bb.config, (side // bb.patch_size,) * 2, 2)
    assert_same(engine(pixels), bb, pixels)


@pytest.mark.slow
def test_the_shape_of_7b(tmp_path: Path) -> None:
    """One block is larger than one file may be."""
    with_onnx()
    bb = made(replace(ARCHITECTURES["dinov3_vit7b16"], depth=2))
    path = bb.export(tmp_path / "m.onnx", size=64)
    assert (tmp_path / "m.onnx.data").stat().st_size > 1 << 30 > path.stat().st_size
    pixels = pixels_of(bb.config, (4, 4))
    assert_same(opened(path)(pixels), bb, pixels)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["dinov3", "dinov2_offset"])
def test_openvino_reads_them(name: str, tmp_path: Path) -> None:
    """Both kinds of file run in OpenVINO in float32, which is not its default on chips with bfloat16."""
    with_onnx("openvino")
    import openvino

    bb = made(name)
    p = bb.patch_size
    for path, grids in (
        (bb.export(tmp_path / "one.onnx", size=(3 * p, 4 * p)), [(3, 4)]),
        (bb.export(tmp_path / "any.onnx", size=(3 * p, 4 * p), dynamic=True), [(3, 4), (5, 5), (2, 9)]),
    ):
        model = openvino.convert_model(path)
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for grid in grids:
            pixels = pixels_of(bb.config, grid, 2)
            found = compiled({"pixel_values": pixels.numpy()}).items()
            tokens = {output.get_any_name(): torch.from_numpy(np.array(t)) for output, t in found}
            assert_same(tokens, bb, pixels, limit=1e-4)
