"""Twelve ways in which other projects call these models, written from their documentation, on a Backbone.

Each pattern is what such a project does after its line that loads a model.  `SERVED` of them run unchanged; what they
get is compared with transformers' model of the same weights.
"""

import importlib.util
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL, hf_layers, hf_model, hf_norm, relative
from pictures import photo
from torch import Tensor, nn

from benchmarks import other_projects
from dinov3_infer import Backbone

SERVED, PATTERNS = 12, 12
LAYERS = [0, 1]
close = 1e-5  # relative: float32, and transformers' q, k and v as three products


class Pair:
    """A random transformers model, our model with the same weights, and a batch for both."""

    def __init__(self, family: str) -> None:
        self.theirs: Any = hf_model(SMALL[family])
        self.model = Backbone.adopt(self.theirs)
        self.side, self.grid = self.model.patch_size, (4, 6)
        self.pixels = torch.randn(2, 3, self.grid[0] * self.side, self.grid[1] * self.side)
        self.prefix = self.model.num_prefix_tokens

    def layers(self) -> list[Tensor]:
        """All tokens after the embedding and after each block, before the norm."""
        return hf_layers(self.theirs, self.pixels)[1]

    def tokens(self, block: int = -1) -> Tensor:
        """The tokens of one block after the final norm, [B, N, C]."""
        normed: Tensor = hf_norm(self.theirs)(self.layers()[block + 1 if block >= 0 else block])
        return normed

    def patches(self, block: int = -1) -> Tensor:
        """The patch tokens as a map, [B, C, h, w]."""
        return self.tokens(block)[:, self.prefix :].unflatten(1, self.grid).permute(0, 3, 1, 2)


@pytest.fixture(params=["dinov3", "dinov2", "dinov2_reg"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


served: dict[str, str] = {}


def pattern(name: str) -> Callable[[Any], Any]:
    def note(test: Any) -> Any:
        served[test.__name__] = name
        return test

    return note


@pattern("PatchCore: forward hooks on two blocks, neighbourhoods averaged, one memory of patches")
@torch.no_grad()
def test_patchcore(pair: Pair) -> None:
    model, caught = pair.model, {}
    modules = dict(model.named_modules())
    for i in LAYERS:
        modules[f"blocks.{i}"].register_forward_hook(lambda module, args, out, i=i: caught.__setitem__(i, out))
    model(pair.pixels)

    def memory(streams: list[Tensor]) -> Tensor:
        maps = [s[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, pair.grid) for s in streams]
        return torch.cat([F.avg_pool2d(m, 3, 1, 1) for m in maps], dim=1).permute(0, 2, 3, 1).flatten(0, 2)

    expected = memory([pair.layers()[i + 1] for i in LAYERS])
    assert relative(memory([caught[i] for i in LAYERS]), expected) < close


@pattern("TokenCut, LOST: a hook on the last qkv, its shape from get_last_selfattention, keys as features")
@torch.no_grad()
def test_tokencut() -> None:
    pair, caught = Pair("dino"), {}
    last = pair.model._modules["blocks"][-1]._modules["attn"]._modules["qkv"]  # type: ignore[index]
    last.register_forward_hook(lambda module, args, out: caught.update(qkv=out))
    attention = pair.model.get_last_selfattention(pair.pixels)
    pictures, heads, tokens = attention.shape[:3]
    qkv = caught["qkv"].reshape(pictures, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    keys = qkv[1].transpose(1, 2).reshape(pictures, tokens, -1)
    projection = [module for name, module in pair.theirs.named_modules() if name.endswith(("k_proj", ".key"))][-1]
    seen: list[Tensor] = []
    projection.register_forward_hook(lambda module, args, out: seen.append(out))
    pair.theirs.set_attn_implementation("eager")
    full = pair.theirs(pair.pixels, output_attentions=True, interpolate_pos_encoding=True).attentions[-1]
    assert relative(keys, seen[0]) < close and relative(attention, full) < close


@pattern("Deep ViT features: a hook on a block's attention that calls its qkv again")
@torch.no_grad()
def test_deep_vit_features() -> None:
    pair, found = Pair("dinov2"), []

    def hook(module: Any, args: Any, out: Tensor) -> None:
        x = args[0]
        heads = module.num_heads
        found.append(module.qkv(x).reshape(*x.shape[:2], 3, heads, x.shape[2] // heads).permute(2, 0, 3, 1, 4)[1])

    pair.model.blocks[1].attn.register_forward_hook(hook)  # type: ignore[union-attr]
    pair.model(pair.pixels)
    projection = [module for name, module in pair.theirs.named_modules() if name.endswith(("k_proj", ".key"))][1]
    keys = projection(pair.theirs.get_submodule("encoder.layer.1.norm1")(pair.layers()[1]))
    assert relative(found[0].transpose(1, 2).flatten(2), keys) < close


@pattern("DPT, Depth Anything: layers with their class tokens, which are read out into the patches")
@torch.no_grad()
def test_dpt(pair: Pair) -> None:
    height, width = (side // pair.model.patch_size for side in pair.pixels.shape[-2:])
    for i, (patches, cls) in zip(
        LAYERS, pair.model.get_intermediate_layers(pair.pixels, LAYERS, return_class_token=True), strict=True
    ):
        joined = torch.cat((patches, cls.unsqueeze(1).expand_as(patches)), dim=-1)
        found = joined.permute(0, 2, 1).reshape(len(patches), -1, height, width)
        tokens = pair.tokens(i)
        expected = torch.cat((pair.patches(i), tokens[:, 0, :, None, None].expand(-1, -1, height, width)), dim=1)
        assert relative(found, expected) < close


@pattern("RoMa: moved by its .device, cast, and the patches of forward_features as a coarse map")
@torch.no_grad()
def test_roma(pair: Pair) -> None:
    held = [pair.model]  # in a list, so that it is no submodule
    if held[0].device != pair.pixels.device:
        held[0] = held[0].to(pair.pixels.device)
    batch, _, height, width = pair.pixels.shape
    side, channels = pair.side, pair.model.embed_dim
    patches = held[0].forward_features(pair.pixels)["x_norm_patchtokens"]  # type: ignore[call-overload]
    found = patches.permute(0, 2, 1).reshape(batch, channels, height // side, width // side)
    assert relative(found, pair.patches()) < close
    half = held[0].to(torch.bfloat16).forward_features(pair.pixels.to(torch.bfloat16))["x_norm_patchtokens"]  # type: ignore[call-overload]
    assert relative(half, patches) < 0.1


@pattern("mmsegmentation, as in DINOv2's notebooks: forward replaced, pixels padded by a hook before it")
@torch.no_grad()
def test_mmseg(pair: Pair) -> None:
    model, side = pair.model, pair.model.patch_size
    model.forward = partial(model.get_intermediate_layers, n=LAYERS, reshape=True)  # type: ignore[method-assign]

    def padded(module: Any, args: Any) -> Tensor:
        spare = [math.ceil(n / side) * side - n for n in args[0].shape[:1:-1]]
        return F.pad(args[0], [part for n in spare for part in (n // 2, n - n // 2)])

    model.register_forward_pre_hook(padded)
    cut = pair.pixels[:, :, 2:-1, 3:-2]
    pair.pixels = padded(None, (cut,))
    maps = model(cut)
    assert isinstance(maps, tuple)
    assert all(relative(m, pair.patches(i)) < close for i, m in zip(LAYERS, maps, strict=True))


@pattern("AnomalyDINO: cropped to whole patches by .patch_size, patches of one picture as an array")
@torch.no_grad()
def test_anomalydino(pair: Pair) -> None:
    image = F.pad(pair.pixels[0], (0, 5, 0, 3))
    height, width = (n - n % pair.model.patch_size for n in image.shape[1:])
    batch = image[:, :height, :width].unsqueeze(0)
    patches = pair.model.get_intermediate_layers(batch)[0].squeeze().cpu().numpy()
    assert patches.shape == (24, 64) and patches.dtype == np.float32
    assert relative(torch.from_numpy(patches), pair.tokens()[0, pair.prefix :]) < close


@pattern("FeatUp, JAFAR: a featurizer that makes a map of forward_features and knows its width beforehand")
@torch.no_grad()
def test_featup(pair: Pair) -> None:
    class Featurizer(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.patch_size, self.dim = model, model.patch_size, model.embed_dim

        def forward(self, image: Tensor) -> Tensor:
            h, w = image.shape[2] // self.patch_size, image.shape[3] // self.patch_size
            tokens = self.model.forward_features(image)["x_norm_patchtokens"]
            return tokens.reshape(-1, h, w, self.dim).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    assert relative(Featurizer(pair.model)(pair.pixels), pair.patches()) < close


@pattern("timm's wrappers, as in segmentation decoders: forward_intermediates with prefix tokens")
@torch.no_grad()
def test_timm_wrappers(pair: Pair) -> None:
    model = pair.model
    found = model.forward_intermediates(
        pair.pixels, indices=LAYERS, return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    for i, (maps, prefix) in zip(LAYERS, found, strict=True):
        assert maps.shape[1] == model.num_features and prefix.shape[1] == model.num_prefix_tokens
        assert relative(maps, pair.patches(i)) < close and relative(prefix, pair.tokens(i)[:, : pair.prefix]) < close


@pattern("DINOv2's linear probe: class tokens of the last blocks and the mean of the last patches")
@torch.no_grad()
def test_linear_probe(pair: Pair) -> None:
    outputs = pair.model.get_intermediate_layers(pair.pixels, 2, return_class_token=True)
    found = torch.cat([*(cls for _, cls in outputs), outputs[-1][0].mean(dim=1)], dim=-1)
    tokens = [pair.tokens(i) for i in LAYERS]
    expected = torch.cat([*(t[:, 0] for t in tokens), tokens[-1][:, pair.prefix :].mean(dim=1)], dim=-1)
    assert relative(found, expected) < close


class FlatIndex:
    """The three common methods of faiss.IndexFlatIP, with the same requirements on arrays."""

    def __init__(self, width: int) -> None:
        self.rows = np.zeros((0, width), np.float32)

    def add(self, x: np.ndarray) -> None:
        assert x.dtype == np.float32 and x.flags.c_contiguous and x.shape[1] == self.rows.shape[1]
        self.rows = np.concatenate((self.rows, x))

    def search(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        products = x @ self.rows.T
        order = np.argsort(-products, axis=1)[:, :k]
        return np.take_along_axis(products, order, axis=1), order


@pattern("faiss: vectors of length 1 from a list of pictures into an index of inner products")
def test_faiss(pair: Pair) -> None:
    pictures = [photo(60 + 7 * i, 90, seed=i) for i in range(6)]
    vectors = pair.model.embed(pictures, batch_size=4, normalize=True)
    index = FlatIndex(vectors.shape[1])
    index.add(vectors)
    scores, found = index.search(pair.model.embed([pictures[4]], normalize=True), 3)
    assert found[0, 0] == 4 and scores[0, 0] == pytest.approx(1, abs=1e-5) and index.rows.shape == (6, 64)
    with torch.no_grad():
        pair.pixels = pair.model.preprocess.batch(pictures).pixels
        assert relative(torch.from_numpy(vectors), F.normalize(pair.tokens()[:, 0], dim=-1)) < close


@pattern("transformers: the fields of a processor go in, and the outputs have transformers' names")
@torch.no_grad()
def test_transformers(pair: Pair) -> None:
    inputs = {"pixel_values": pair.pixels}
    assert relative(pair.model(**inputs).cls_token, pair.tokens()[:, 0]) < close
    outputs = pair.model.extract_features([photo(50, 70)])
    pair.pixels = pair.model.preprocess.batch([photo(50, 70)]).pixels
    assert relative(outputs.last_hidden_state, pair.tokens()) < close
    assert relative(outputs.pooler_output, pair.tokens()[:, 0]) < close
    outputs = pair.model(pair.pixels)
    assert relative(outputs.last_hidden_state, pair.tokens()) < close
    assert relative(outputs.pooler_output, pair.tokens()[:, 0]) < close
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_register_tokens")
    for name in names:
        assert getattr(pair.model.config, name) == getattr(pair.theirs.config, name, 0), name


def test_the_count_is_right() -> None:
    """The README states the number of patterns in this file."""
    assert len(served) == SERVED


# --- the projects themselves: records/other_projects.json has all models --------------------------------------------


def alone(project: str, *arguments: object) -> dict[str, Any]:
    """The result of a project in a new process, because Anomalib changes timm for the whole process."""
    if importlib.util.find_spec(project) is None:
        pytest.skip(f"needs {project}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=other_projects.mend_torchvision) as pool:
        return pool.submit(getattr(other_projects, project), *arguments).result()


@pytest.mark.peers
def test_sentence_transformers_encodes_to_our_vector() -> None:
    """From a folder of `save_pretrained`; a bare folder of transformers gives another vector."""
    for name, row in alone("sentence_transformers", ("nano", "dinov2_vits14_reg"))["models"].items():
        assert row["least_cosine"] > 0.99999 and row["least_cosine_without_the_files"] < 0.9, name


@pytest.mark.peers
def test_anomalib_scores_as_on_a_model_of_timm() -> None:
    """AnomalyDINO, Dinomaly and PatchCore."""
    for name, row in alone("anomalib", ("vit_small_patch16_dinov3_qkvb",))["methods"].items():
        assert row["difference_of_scores"] < 1e-3 and row["difference_of_maps"] < 1e-2, name


@pytest.mark.peers
def test_dinotool_gives_the_tokens_of_transformers() -> None:
    for name, row in alone("dinotool")["models"].items():
        assert row["difference_of_class_tokens"] < 1e-4 and row["difference_of_patches"] < 1e-4, name
        assert row["pca"] == [6, row["grid"], row["grid"], 3]
