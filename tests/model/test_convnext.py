"""ConvNeXt against numbers of Meta's code, and its other properties."""

import itertools

import pytest
import torch
from fill import filled, noise
from torch import Tensor

from dinov3_infer import Backbone, ConvNeXtConfig, InputError, InputTypeError, LayerError, UnsupportedError
from dinov3_infer.backbone import ConvNeXtBackbone

pytestmark = pytest.mark.usefixtures("no_grad")

SMALL = ConvNeXtConfig((2, 1, 3, 1), (8, 16, 24, 32))


@pytest.fixture(scope="module")
def small() -> ConvNeXtBackbone:
    with torch.no_grad():
        return filled(Backbone(SMALL).double(), 7)  # type: ignore[return-value]


def agrees(found: Tensor, total: float, size: float | None, *first: float) -> None:
    """Compares sum, sum of absolute values and first values."""
    expected = torch.tensor([total, *([] if size is None else [size]), *first], dtype=torch.float64)
    sums = [found.sum(), *([] if size is None else [found.abs().sum()])]
    values = torch.stack([*sums, *found.flatten()[: len(first)]])
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-8)


def test_forward_features_are_metas(small: ConvNeXtBackbone) -> None:
    """Class token, patches and raw map of two images agree to eight decimals."""
    found = small.forward_features(noise(8, 2, 3, 64, 96))
    assert isinstance(found, dict)
    agrees(found["x_norm_clstoken"], -1.44865692, 50.71318511, -0.32373476, 1.91187793, -0.22056915, 0.70300935)
    agrees(found["x_norm_patchtokens"], -3.67390158, 307.37813155, -0.0644617, 1.02841908, 0.70574287, -1.07086534)
    agrees(found["x_prenorm"], -35.44595232, 354.18242742, -0.54361613, 0.72725108, 0.3460564, -1.85300231)
    assert found["x_storage_tokens"].shape == (2, 0, 32)
    output = small(noise(8, 2, 3, 64, 96))
    assert torch.equal(output.cls_token, found["x_norm_clstoken"])
    assert torch.equal(output.patch_tokens, found["x_norm_patchtokens"])


STAGES = {  # (stage, norm): sum, sum of absolute values, first values; then sum and first value of the class token
    (0, False): ((382.68822177, 5844.99004392, -0.65435129, -2.08815186, 1.54701221), (0.99658391, -0.00249731)),
    (1, True): ((-105.24234099, 2246.01605748, 0.43669964, 0.22942747, 1.72900353), (-1.09627439, 0.19541456)),
    (2, True): ((20.76394632, 1058.32692953, 0.76847214, 0.2180572, -0.70348274), (0.86516443, -0.33162401)),
    (3, False): ((-35.44595232, 354.18242742, -0.54361613, 0.56660164, -1.42618294), (-5.90765872, -0.1971774)),
    (3, True): ((-3.67390158, 307.37813155, -0.0644617, 0.68406269, -1.29883428), (-1.44865692, -0.32373476)),
}
RESIZED = {  # with patch_size=16
    (0, True): (24.23369038, 109.15182979, -0.33363247, 0.02716396, -0.11247644),
    (1, True): (-25.40678958, 252.63841621, 0.51026232, 0.60483535, 0.2400231),
    (3, False): (-141.78380929, 1148.36944462, -0.54361613, -0.26606169, 0.28904719),
    (3, True): (-19.75453142, 1219.59642487, -0.0644617, 0.15274938, 0.65855652),
}


@pytest.mark.parametrize(("stage", "norm"), STAGES)
def test_stages_are_metas(small: ConvNeXtBackbone, stage: int, norm: bool) -> None:
    """`get_intermediate_layers`, and `layers=`, in which the last stage is normed."""
    ((dense, cls_token),) = small.get_intermediate_layers(
        noise(8, 2, 3, 64, 96), [stage], reshape=True, return_class_token=True, norm=norm
    )
    agrees(dense, *STAGES[stage, norm][0])
    total, first = STAGES[stage, norm][1]
    agrees(cls_token, total, None, first)
    if norm or stage < 3:
        (layer,) = small(noise(8, 2, 3, 64, 96), layers=[stage]).layers
        assert torch.equal(layer.cls_token, cls_token) and layer.register_tokens.shape == (2, 0, SMALL.widths[stage])
        assert torch.equal(layer.patch_tokens.mT.unflatten(2, dense.shape[2:]), dense)


@pytest.mark.parametrize(("stage", "norm"), RESIZED)
def test_stages_on_a_grid_that_was_asked_for(small: ConvNeXtBackbone, stage: int, norm: bool) -> None:
    """With Meta's `patch_size` maps are resized before the norm."""
    pixels = noise(8, 2, 3, 64, 96)
    (dense,) = small.get_intermediate_layers(pixels, [stage], reshape=True, norm=norm, patch_size=16)
    agrees(dense, *RESIZED[stage, norm])
    (same,) = small.get_intermediate_layers(pixels, [2], reshape=True, patch_size=16)
    assert torch.equal(same, small.get_intermediate_layers(pixels, [2], reshape=True)[0])


def test_a_size_of_no_whole_patches(small: ConvNeXtBackbone) -> None:
    """Rounding sides down to 4 pixels changes nothing; the rounding of each later stage changes the result."""
    pixels = noise(9, 1, 3, 70, 100)
    output = small(pixels)
    agrees(output.cls_token, -1.22567378, 23.50091293, -0.16849973, 0.402645, 0.17408991)
    assert output.patch_tokens.shape == (1, 6, 32) and small.grid_of(pixels) == (2, 3)
    assert torch.equal(output.cls_token, small(pixels[:, :, :68]).cls_token)
    assert not torch.allclose(output.cls_token, small(pixels[:, :, :64, :96]).cls_token, atol=0.1)


def test_intermediates_are_timms(small: ConvNeXtBackbone) -> None:
    """The raw maps, ordered from shallow to deep."""
    pixels = noise(8, 1, 3, 64, 96)
    raw = small.get_intermediate_layers(pixels, 4, reshape=True, norm=False)
    last, found = small.forward_intermediates(pixels)
    assert torch.equal(last, raw[3]) and all(map(torch.equal, found, raw))
    (second,) = small.forward_intermediates(pixels, [1], intermediates_only=True)
    assert torch.equal(second, raw[1])
    with pytest.raises(InputError, match="NCHW"):
        small.forward_intermediates(pixels, output_fmt="NLC")


def test_the_contract_of_a_network(small: ConvNeXtBackbone) -> None:
    """Layers are stages, each with its own width, stride and grid."""
    pixels = torch.zeros(1, 3, 100, 70)
    assert [small.stride(i) for i in range(4)] == [4, 8, 16, 32] and small.stride() == small.patch_size == 32
    assert [small.width(i) for i in range(4)] == [8, 16, 24, 32] and small.width() == small.embed_dim == 32
    assert [small.grid_of(pixels, i) for i in range(4)] == [(25, 17), (12, 8), (6, 4), (3, 2)]
    assert (small.n_blocks, small.num_register_tokens, small.num_prefix_tokens) == (4, 0, 1)
    assert small.description() == {"depths": (2, 1, 3, 1), "widths": (8, 16, 24, 32), "norm_eps": 1e-6}
    assert small.why_not_triton() == "this network has no attention"


def test_every_tensor_is_noticed(small: ConvNeXtBackbone) -> None:
    """Adding 1 % to any tensor changes the class token and the patches."""
    pixels = noise(8, 1, 3, 64, 96)
    before = small(pixels)
    for name, tensor in small.state_dict().items():
        kept = tensor.clone()
        tensor.mul_(1.01)
        after = small(pixels)
        tensor.copy_(kept)
        assert not torch.equal(after.cls_token, before.cls_token), name
        assert not torch.equal(after.patch_tokens, before.patch_tokens), name


WRONG = [
    (lambda bb: bb(torch.zeros(1, 3, 31, 64)), InputError, "input 31x64 is too small; give at least 32 pixels"),
    (lambda bb: bb(torch.zeros(1, 4, 64, 64)), InputError, r"pixels of shape \[B, 3, height, width\], got \[1, 4,"),
    (lambda bb: bb(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), InputTypeError, "normalised float pixels, got"),
    (lambda bb: bb(["a.jpg"]), InputTypeError, "got list; use extract_features"),
    (lambda bb: bb(torch.zeros(1, 3, 64, 64), layers=5), LayerError, "layers=5 asks for the last 5 blocks of 4"),
    (lambda bb: bb(torch.zeros(1, 3, 64, 64), masks=torch.zeros(1, 4).bool()), UnsupportedError, "mask token"),
    (lambda bb: bb.get_intermediate_layers(torch.zeros(1, 3, 64, 64), [0, 0]), InputError, "a stage twice"),
    (lambda bb: bb.set_attention("sdpa"), UnsupportedError, "needs attention, which this network does not have"),
    (lambda bb: bb.attention_maps(torch.zeros(3, 64, 64)), UnsupportedError, "an attention map needs attention"),
    (lambda bb: bb.extract_features(torch.zeros(3, 64, 64), layers=1, facet="key"), UnsupportedError, "facet='key'"),
    (lambda bb: bb.extract_features(torch.zeros(3, 64, 64), fit="pad"), UnsupportedError, "fit='pad' does not work"),
    (lambda bb: next(bb.iter_features([torch.zeros(3, 64, 64)], fit="pad")), UnsupportedError, "would see the padding"),
    (lambda bb: bb.embed([torch.zeros(3, 64, 64)], fit="pad"), UnsupportedError, "use 'native', 'crop' or 'squash'"),
    (lambda bb: ConvNeXtConfig((3, 3, 9), (8, 16, 24, 32)), InputError, r"depths is \(3, 3, 9\); give four"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), WRONG, ids=range(len(WRONG)))
def test_what_it_cannot_do_is_one_sentence(small: ConvNeXtBackbone, call, kind, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=words):
        call(small)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("side", [(32, 32), (96, 32), (70, 100), (224, 224)], ids=str)
def test_an_image_is_the_same_alone_and_in_a_batch(side: tuple[int, int], threads: int) -> None:
    """Class token and every stage have the same bits, at the width of the smallest released model."""
    model = filled(Backbone(ConvNeXtConfig((1, 1, 1, 1), (96, 192, 384, 768))), 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pixels = torch.randn(5, 3, *side)
        alone = [model(pixels[i : i + 1], layers=4) for i in range(5)]
        for count in (2, 3, 5):
            together = model(pixels[:count], layers=4)
            for i, stage in itertools.product(range(count), range(4)):
                assert torch.equal(together.cls_token[i], alone[i].cls_token[0])
                for part, whole in zip(alone[i].layers[stage], together.layers[stage], strict=True):
                    assert torch.equal(whole[i], part[0]), (i, stage)
    finally:
        torch.set_num_threads(before)
