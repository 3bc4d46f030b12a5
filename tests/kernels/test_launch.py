"""What the launchers decide before a kernel runs: offsets, options, measured configurations."""

import itertools
import sys
from typing import Any

import pytest
import torch
from qkv import grid_table, offsets
from torch import Tensor

pytest.importorskip("triton", minversion="3.6")
from dinov3_infer_kernels.gpu import configs, launch, rotation  # after the check
from dinov3_infer_kernels.gpu.configs import SHORT, TABLE, Config
from dinov3_infer_kernels.gpu.forward import forward
from dinov3_infer_kernels.gpu.short import short_kernel

warm = sys.modules["dinov3_infer_kernels.gpu.warm"]  # the package has a function of that name

SMALL = ("small", "sm86", "sm89", "sm120")  # chips of one column of the table
ROWS = sorted({c for chips in (*TABLE.values(), SHORT) for rows in chips.values() for _, c in rows}, key=str)


# --- offsets -------------------------------------------------------------------------------------------------------


def far(shape: tuple[int, ...], stride_token: int) -> Tensor:
    """A view on the meta device whose tokens lie that far apart."""
    *lead, parts, heads, width = shape
    strides = (parts * heads * width, stride_token) if len(lead) == 2 else (stride_token,)
    return torch.empty_strided((*lead, parts, heads, width), (*strides, heads * width, width, 1), device="meta")


@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
@pytest.mark.parametrize(
    ("tokens", "stride", "copied"),
    [(70, 2**25, True), (70, 384, False), (1, 2**40, False), (2, 2**31 - 65, False), (2, 2**31 - 64, True)],
    ids=["far", "near", "one", "last", "first"],
)
def test_tokens_far_apart_are_brought_together(tokens: int, stride: int, copied: bool, packed: bool) -> None:
    """Offsets of tokens within an image are 32-bit numbers in the kernels; what is beyond is copied first."""
    qkv = far((tokens, 3, 2, 64) if packed else (2, tokens, 3, 2, 64), stride)
    ends = torch.empty(2, dtype=torch.int32, device="meta") if packed else None
    found, shape = launch.near(qkv, launch.check(qkv, cu_seqlens=ends, max_seqlen=tokens))
    assert (found is not qkv) == copied
    assert shape.strides == (0 if packed else found.stride(0), *found.stride()[-4:-1])
    assert (tokens - 1) * shape.strides[1] + 64 < 2**31 or tokens == 1
    assert not copied or found.is_contiguous()


def test_batches_of_one_image_expanded_keep_their_own_stride() -> None:
    """An expanded batch has stride 0; its contiguous copy has not."""
    qkv = far((1, 70, 3, 2, 64), 2**25).expand(3, -1, -1, -1, -1)
    found, shape = launch.near(qkv, launch.check(qkv))
    assert shape.strides[0] == found.stride(0) == 70 * 384


def test_an_image_beyond_32_bits_is_refused() -> None:
    """Its gradient would be written to the wrong place."""
    qkv = torch.empty(1, 2**31 // 6144 + 1, 3, 32, 64, device="meta")
    with pytest.raises(ValueError, match="use attn_implementation='sdpa'"):
        launch.near(qkv, launch.check(qkv))


def test_tokens_far_apart_are_right() -> None:
    """In the interpreter; the buffer is 4.7 GB of addresses, of which only the tokens are touched."""
    try:
        buffer = torch.empty(70 * 2**25, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system gives no address space that it has no memory for")
    qkv = buffer.as_strided((1, 70, 3, 1, 64), (0, 2**25, 64, 64, 1))
    qkv.copy_(torch.randn(qkv.shape))
    table = grid_table([(5, 13)], 64)
    found, expected = (forward(x, *table, None, 70, 0.125)[0] for x in (qkv, qkv.contiguous()))
    assert torch.equal(found, expected)


# --- one program a head -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "tokens", "heads", "width", "dtype", "chosen"),
    [
        ("sm90", 261, 132, 64, torch.bfloat16, True),
        ("sm90", 261, 131, 64, torch.bfloat16, False),  # too few programs to fill the chip
        ("sm90", 272, 132, 64, torch.float16, True),
        ("sm90", 273, 132, 64, torch.float16, False),
        ("sm90", 128, 132, 64, torch.float16, False),
        ("sm90", 261, 132, 128, torch.bfloat16, False),
        ("sm90", 261, 132, 64, torch.float32, False),
        ("sm80", 201, 132, 64, torch.bfloat16, True),
        ("sm100", 201, 132, 64, torch.bfloat16, True),
        ("small", 201, 132, 64, torch.bfloat16, False),
        ("sm86", 288, 132, 64, torch.bfloat16, True),
        ("sm89", 201, 132, 64, torch.bfloat16, True),
        ("sm86", 289, 132, 64, torch.bfloat16, False),
        ("sm120", 201, 132, 64, torch.bfloat16, False),  # never compiled for
    ],
)
def test_who_gets_one_program_a_head(
    chip: str, tokens: int, heads: int, width: int, dtype: torch.dtype, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-bit heads of 64 channels of a few hundred tokens, on chips with the shared memory, enough of them."""
    monkeypatch.setattr(configs, "chip_of", lambda _: "small" if chip in SMALL else chip)
    monkeypatch.setattr(configs, "_has_room", lambda _: chip in ("sm86", "sm89") or chip not in SMALL)
    qkv = torch.empty(1, 1, 3, 1, width, dtype=dtype)
    found = configs.whole_heads(qkv, tokens, heads)
    assert (found is not None) == chosen and (found is None or found.whole and tokens <= found.block_n)


@pytest.mark.parametrize(
    ("capability", "hip", "room"),
    [((8, 6), None, True), ((8, 9), None, True), ((12, 0), None, False), ((8, 6), "6", False), ((9, 0), None, True)],
)
def test_who_has_room_for_a_head(
    capability: tuple[int, int], hip: str | None, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the small chips those that the kernel is compiled for."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for cached in (configs.chip_of, configs._has_room):
        cached.cache_clear()
    try:
        assert configs._has_room(torch.device("cuda", 7)) is room
        assert (configs.whole_head(torch.device("cuda", 7), 201) is not None) is room
    finally:
        for cached in (configs.chip_of, configs._has_room):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "images"), [(201, 6, 64, 22), (261, 16, 64, 9), (300, 6, 64, 0), (201, 6, 128, 0)]
)
def test_the_batch_from_which_it_runs(tokens: int, heads: int, width: int, images: int) -> None:
    """On a chip of 132 multiprocessors; a trial of the plan takes as many."""
    device = torch.device("cpu")
    assert configs.large_batch(device, torch.bfloat16, width, tokens, heads) == images
    qkv = torch.empty(1, 1, 3, 1, width, dtype=torch.bfloat16)
    for count in (images - 1, images):
        found = configs.whole_heads(qkv, tokens, max(count, 0) * heads)
        assert (found is not None) is (count == images > 0)


@pytest.mark.parametrize(("images", "rotated"), [(33, True), (32, True), (33, False)])
def test_the_launcher_asks_for_it(images: int, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the heads of all images, and never without a rotation."""
    started: list[Any] = []
    module = sys.modules[forward.__module__]
    monkeypatch.setattr(module, "launch", lambda *given, **_: started.append(given[:3]))
    cos, sin = (torch.ones(201, 32), torch.zeros(201, 32)) if rotated else (None, None)
    forward(torch.empty(images, 201, 3, 4, 64, dtype=torch.bfloat16), cos, sin, None, 201, 0.125)
    ((kernel, programs, config),) = started
    whole = images == 33 and rotated
    assert (kernel is short_kernel) == config.whole == whole and (programs == images * 4) == whole


@pytest.mark.parametrize(
    ("lengths", "tile"), [([261] * 3, (128, 128)), ([261, 261, *[41] * 8], (64, 64)), ([201] * 2, (128, 64))], ids=str
)
def test_packed_pictures_get_the_tile_of_their_mean(
    lengths: list[int], tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two global crops beside eight local ones: most tiles are of the small ones."""
    started: list[Config] = []
    monkeypatch.setattr(sys.modules[forward.__module__], "launch", lambda *given, **_: started.append(given[2]))
    forward(torch.empty(sum(lengths), 3, 2, 64).half(), None, None, offsets(lengths), max(lengths), 0.125)
    assert [(c.block_m, c.block_n) for c in started] == [tile]


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ROWS, ids=str)
def test_every_launch_asks_for_fused_multiplications(config: Config) -> None:
    """Triton's default changes between versions, and with it speed and rounding."""
    assert config.options()["enable_fp_fusion"] is True


@pytest.mark.parametrize(
    ("version", "without"),
    [("3.6.0", True), ("3.8.1", True), ("3.9.0", False), ("3.10.0", False), ("4.0.0+git", False)],
)
def test_who_leaves_out_a_fence(version: str, without: bool) -> None:
    assert configs.unfenced(version) is without


def test_nothing_is_in_flight_where_a_fence_is_missing() -> None:
    """In the passes of the gradient over 16-bit numbers, on chips whose products read shared memory by themselves."""
    found = configs.fenced(TABLE)
    for key, chips in TABLE.items():
        for chip, rows in chips.items():
            changed = key[0] in ("key_value", "query") and key[2] == 2 and chip in ("sm90", "sm100")
            stages = [1] * len(rows) if changed else [c.stages for _, c in rows]
            assert [c.stages for _, c in found[key][chip]] == stages
            assert [(limit, c.block_m, c.block_n) for limit, c in found[key][chip]] == [
                (limit, c.block_m, c.block_n) for limit, c in rows
            ]


# --- measured configurations ---------------------------------------------------------------------------------------


class OnCuda:
    """A tensor's answers about itself, of a GPU that is not there."""

    shape, device, is_cuda = (1, 261, 3, 2, 64), torch.device("cuda", 0), True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def element_size(self) -> int:
        return self.dtype.itemsize


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that were measured, in order; each takes longer than the one before."""
    found: list[Config] = []

    def bench(run: Any, **_: Any) -> float:
        run()
        return float(len(found))

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(configs, "_fastest", {})
    monkeypatch.setattr(configs, "chip_of", lambda _: "sm90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("DINOV3_INFER_AUTOTUNE", "1")
    return found


def chosen(run: Any, dtype: torch.dtype = torch.bfloat16, longest: int = 261, **form: bool) -> Config:
    qkv: Any = OnCuda(dtype)
    return configs.select("forward", qkv, longest, run, **(dict(packed=False, rotated=True) | form))


def test_what_changes_a_kernel_is_measured_by_itself(measured: list[Config]) -> None:
    """Each dtype, form and power of two of the length once, and never again."""
    forms = list(itertools.product((torch.bfloat16, torch.float16), (261, 1029), (False, True), (False, True)))
    for number, (dtype, longest, packed, rotated) in enumerate(forms * 2):
        before = len(measured)
        chosen(measured.append, dtype, longest, packed=packed, rotated=rotated)
        assert (len(measured) > before) == (number < len(forms))


def test_nothing_is_measured_inside_a_capture(measured: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is the row of the table, or what was measured before."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(measured.append) == TABLE["forward", 64, 2]["sm90"][-1][1] and not measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fastest = chosen(measured.append)
    count = len(measured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(measured.append) == fastest and len(measured) == count


def test_configurations_that_fail_are_left_out(measured: list[Config]) -> None:
    """A compiler's pass that fails is a RuntimeError; where all fail, its reason is raised."""

    def all_but_one(config: Config) -> None:
        if config != Config(128, 128, 8, 2):
            raise RuntimeError("PassManager::run failed")
        measured.append(config)

    assert chosen(all_but_one) == Config(128, 128, 8, 2)

    def none(config: Config) -> None:
        raise RuntimeError("PassManager::run failed")

    with pytest.raises(RuntimeError, match="PassManager"):
        chosen(none, longest=1029)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("chip", ["sm80", "sm90", "sm100", "small"])
def test_the_crossover_follows_the_chip(chip: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 pixels are the kernel's everywhere, 512 pixels on Hopper and data centre Blackwell alone at most."""
    monkeypatch.setattr(configs, "chip_of", lambda _: chip)
    found = configs.crossover(torch.device("cuda", 0), torch.bfloat16, width)
    assert found >= 261 and (found < 1029 or (chip in ("sm90", "sm100") and width == 64))


# --- compiled before they are needed -------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Kernels by what makes Triton compile them: their constants and options, not their numbers."""
    found: list[tuple[Any, ...]] = []

    def launched(kernel: Any, programs: int, config: Config, *given: Any, **constants: Any) -> None:
        ints = tuple((v == 1, v % 16 == 0) for v in given[-8:-1] if type(v) is int)
        found.append((kernel, config, tuple(t is None for t in given[:4]), ints[-5:], tuple(constants.items())))

    for module in ("forward", "rotation"):
        monkeypatch.setattr(sys.modules[f"dinov3_infer_kernels.gpu.{module}"], "launch", launched)
    monkeypatch.setattr(configs, "chip_of", lambda _: "sm90")
    monkeypatch.setattr(configs, "processors", lambda _: 132)
    return found


def all_forms(count: int, heads: int, packed: bool, dtype: torch.dtype, images: int) -> None:
    tables = torch.ones(2, count, 32, dtype=torch.float16 if dtype == torch.bfloat16 else torch.float32)
    shape = (images, count, 3, heads, 64)
    qkv = torch.empty(shape[1:] if packed else shape, dtype=dtype, device="meta")
    forward(qkv, *tables, offsets([count]) if packed else None, count, 0.125)


@pytest.mark.parametrize("chip", ["sm80", "sm90", "sm100", "small"])
@pytest.mark.parametrize("heads", [6, 16])
def test_nothing_is_compiled_in_the_middle_of_a_run(
    chip: str, heads: int, started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever images come after `warm`, alone and in batches, of one size and packed: every form is there already."""
    monkeypatch.setattr(configs, "chip_of", lambda _: chip)
    monkeypatch.setattr(warm, "chip_of", lambda _: chip)
    monkeypatch.setattr(configs, "_has_room", lambda _: True)
    dtype = torch.bfloat16
    assert warm.warm(torch.empty(0, dtype=dtype), heads, 64, torch.float16) == len(started)
    before = set(started)
    assert len(before) == len(started) < 40
    for count in range(6, 1700):
        for images in (1, 64):
            all_forms(count, heads, False, dtype, images)
        all_forms(count, heads, True, dtype, 1)
    assert set(started) == before | {form for form in started if form[0] is rotation.rotate_kernel}


@pytest.mark.parametrize("count", [201, 261, 1029])
def test_one_size_needs_its_own_forms_alone(count: int, started: list[tuple[Any, ...]]) -> None:
    """The last, smaller batch among them."""
    warm.warm(torch.empty(0, dtype=torch.bfloat16), 6, 64, torch.float16, count)
    before = set(started)
    assert len(before) == len(started) == (1 if count > 272 else 2)
    for images in (64, 3):
        all_forms(count, 6, False, torch.bfloat16, images)
    assert set(started) == before


def test_what_torch_attends_is_not_compiled(started: list[tuple[Any, ...]]) -> None:
    """Long images get a rotation, and without one only packed images are the kernel's."""
    like = torch.empty(0, dtype=torch.bfloat16)
    assert warm.warm(like, 6, 64, torch.float16, 4101) == 1 and started.pop()[0] is rotation.rotate_kernel
    assert warm.warm(like, 6, 64, None, 4101) == 0
    assert warm.warm(like, 6, 64, None) == len(started) == 3
    assert warm.warm(torch.empty(0, dtype=torch.float64), 6, 64, None) == 0
