"""torch.hub: Meta's names, keywords and calls, from a checkout and from an archive, without left-overs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pictures import complaint, photo
from repository import ROOT
from texts import SMALL, SPLIT, small_heads
from torch import nn

from dinov3_infer import Backbone, InputError, InputTypeError, ModelNotFoundError, UnsupportedError
from dinov3_infer.released.catalogue import HEADS
from dinov3_infer.torchhub import HubBackbone, _head_entry
from dinov3_infer.zoo import MODELS

HAS_TRITON = importlib.util.find_spec("triton") is not None
# As the hubconf.py of facebookresearch/dinov3, dinov2 and dino name them
META = re.findall(r"\w+", """
    dinov3_vits16 dinov3_vits16plus dinov3_vitb16 dinov3_vitl16 dinov3_vith16plus dinov3_vit7b16
    dinov3_convnext_tiny dinov3_convnext_small dinov3_convnext_base dinov3_convnext_large
    dinov2_vits14 dinov2_vitb14 dinov2_vitl14 dinov2_vitg14
    dinov2_vits14_reg dinov2_vitb14_reg dinov2_vitl14_reg dinov2_vitg14_reg
    dino_vits16 dino_vits8 dino_vitb16 dino_vitb8
""")  # fmt: skip
META_ONLY = re.findall(r"\w+", """
    dinov3_vitl16plus
    dinov3_vit7b16_de dinov3_vit7b16_ms
    dino_resnet50 dino_xcit_small_12_p16 dino_xcit_small_12_p8 dino_xcit_medium_24_p16 dino_xcit_medium_24_p8
""")  # fmt: skip


def load(name: str, *arguments: object, **options: object) -> Any:
    return torch.hub.load(str(ROOT), name, *arguments, source="local", **options)


@pytest.fixture(scope="module")
def hubconf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of one model of each family, in files like Meta's."""
    folder = tmp_path_factory.mktemp("weights")
    names = ("dinov3_vits16", "dinov2_vits14_reg", "dino_vits16")
    return {
        name: Backbone.from_config(name, seed=0).save_pretrained(folder / f"{name}.pth", layout="meta")
        for name in names
    }


# --- what there is -------------------------------------------------------------------------------------------------


def test_entry_points_are_metas_and_all_others_of_the_zoo(hubconf: ModuleType) -> None:
    entries = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert entries == {*MODELS, *META_ONLY, *(row.name for row in HEADS)} and entries >= set(META)
    for name in entries:
        entry = getattr(hubconf, name)
        assert entry.__name__ == name and entry.__doc__  # what torch.hub.help shows


def test_only_core_dependencies(hubconf: ModuleType) -> None:
    """torch.hub refuses to load if a listed dependency is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {re.split("[><=~ ;]", line)[0] for line in project["dependencies"]} | {"tqdm"}
    modules = {"pillow": "PIL", "huggingface-hub": "huggingface_hub"}
    assert set(hubconf.dependencies) == {modules.get(name, name) for name in core}


@pytest.mark.parametrize("name", META_ONLY)
def test_what_only_meta_has_is_refused_by_name(name: str) -> None:
    text = complaint(UnsupportedError, lambda: load(name, pretrained=False))
    assert text.startswith(f"'{name}' is ") and re.search("timm|never released|vision transformers are here|load", text)


# --- the models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov2_vits14_reg", "dino_vits16"])
def test_the_call_is_metas(name: str, files: dict[str, Path], no_grad: None) -> None:
    model = load(name, weights=str(files[name]))
    plain = Backbone.from_pretrained(name, weights=files[name], device="cpu")
    pixels = torch.randn(2, 3, 8 * plain.patch_size, 4 * plain.patch_size)
    expected = plain.forward_features(pixels)
    assert isinstance(model, Backbone) and not model.training and model.device.type == "cpu"
    assert model(pixels).equal(expected["x_norm_clstoken"])
    tokens = model(pixels, is_training=True)
    assert tokens.keys() == expected.keys()
    assert all(tokens[k].equal(expected[k]) for k in expected if expected[k] is not None)
    if plain.config.mask_token:
        masks = torch.zeros(2, 32, dtype=torch.bool)
        masks[:, ::3] = True
        masked = plain.forward_features(pixels, masks)
        assert model(pixels, masks).equal(masked["x_norm_clstoken"])
        assert not masked["x_norm_clstoken"].equal(expected["x_norm_clstoken"])
    crops = [pixels, pixels[..., : 2 * plain.patch_size]]
    several = model(crops, masks=[None, None], is_training=True)
    for one, crop, cls_token in zip(several, crops, model(crops), strict=True):
        assert one["x_norm_patchtokens"].equal(plain.forward_features(crop)["x_norm_patchtokens"])  # type: ignore[call-overload]
        assert cls_token.equal(one["x_norm_clstoken"])


def test_everything_else_is_as_in_a_backbone(files: dict[str, Path], tmp_path: Path) -> None:
    model = load("dinov3_vits16", weights=files["dinov3_vits16"])
    plain = Backbone.from_pretrained("dinov3_vits16", weights=files["dinov3_vits16"], device="cpu")
    pictures = [photo(48, 64), photo(80, 48)]
    for left, right in zip(
        model.iter_features(pictures, fit="native"), plain.iter_features(pictures, fit="native"), strict=True
    ):
        assert left.patch_tokens.equal(right.patch_tokens)
    ours, theirs = (bb.extract_features(pictures, size=64, layers=2, pooling="cls_mean") for bb in (model, plain))
    assert ours.embedding.equal(theirs.embedding) and ours.layers[0].cls_token.equal(theirs.layers[0].cls_token)
    assert model.attention_maps(pictures[0], size=64).equal(plain.attention_maps(pictures[0], size=64))
    pixels = torch.randn(1, 3, 64, 64)
    layers = zip(model.get_intermediate_layers(pixels, 2), plain.get_intermediate_layers(pixels, 2), strict=True)
    assert all(a.equal(b) for a, b in layers)
    assert model.fingerprint() == Backbone.from_pretrained(model.save_pretrained(tmp_path / "hf")).fingerprint()
    assert (model.embed_dim, model.patch_size, model.n_storage_tokens, len(model.blocks)) == (384, 16, 4, 12)


def test_heads_have_metas_names_and_keywords(tmp_path: Path, no_grad: None) -> None:
    """Heads return logits or depth for pixels; variants are chosen as in Meta's entries."""
    classifier = load("dinov2_vits14_lc", pretrained=False, layers=1)
    assert classifier(torch.randn(1, 3, 28, 28)).shape == (1, 1000) and classifier.weight.shape == (1000, 768)
    assert load("dinov2_vits14_ld", pretrained=False, layers=1, weights="KITTI").most == 80
    depth = load("dinov2_vits14_dd", pretrained=False)
    assert depth(torch.randn(1, 3, 30, 40)).shape == (1, 1, 30, 40) and depth.most == 10
    backbone = depth.backbone.save_pretrained(tmp_path / "backbone.pth", "meta")
    head = depth.save(tmp_path / "head.safetensors")
    again = load("dinov2_vits14_dd", weights=str(head), backbone_weights=str(backbone))
    pixels = torch.randn(1, 3, 28, 28)
    assert again(pixels).equal(depth(pixels))
    assert load("dinov2_vits14_ade20k_ms", pretrained=False)(pixels).shape == (1, 150, 28, 28)
    wrong = complaint(InputError, lambda: load("dinov2_vits14_dd", pretrained=False, layers=4))
    assert "was released for 'NYU' or 'KITTI', not for 4" in wrong
    wrong = complaint(InputError, lambda: load("dinov3_vitl16_chmv2", pretrained=False, weights="NYU"))
    assert "was released for one kind only, not for 'NYU'" in wrong


def test_text_heads_come_as_metas(tmp_path: Path, no_grad: None) -> None:
    """DINOv3's entry gives the model and its tokenizer, DINOv2's the model; both are called with pixels and ids."""
    with small_heads():
        model, tokenizer = _head_entry(SMALL)(pretrained=False)
        pixels, ids = torch.randn(2, 3, 64, 64), tokenizer.tokenize(["a cat"])
        assert [tuple(t.shape) for t in model(pixels, ids)] == [(2, 384), (1, 384), (1,), (2, 16, 192), (2, 16, 192)]
        backbone, head = tmp_path / "backbone.pth", model.save(tmp_path / "head.safetensors")
        model.backbone.save_pretrained(backbone, "meta")
        again, _ = _head_entry(SMALL)(weights=str(head), backbone_weights=str(backbone), bpe_path_or_url="x.gz")
        assert again.encode_image(pixels).equal(model.encode_image(pixels))
        assert again.encode_text(ids, normalize=True).equal(model.encode_text(ids, normalize=True))
        assert len(_head_entry(SPLIT)(pretrained=False)(pixels, ids)) == 3


def test_inside_another_module_and_with_gradients() -> None:
    """Downstream code holds the model as a submodule, calls it and trains it."""
    model = nn.Sequential(load("nano", pretrained=False), nn.Linear(192, 3)).train()
    loss = model(torch.randn(2, 3, 32, 32)).square().sum()
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "mask_token" not in n)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, object]]]:
    """Records the arguments of from_pretrained and from_config."""
    found: list[tuple[str, object]] = []
    monkeypatch.setattr(HubBackbone, "from_pretrained", lambda name, **options: found.append((name, options)))
    monkeypatch.setattr(HubBackbone, "from_config", lambda name: found.append((name, "random")))
    yield found


SAT = SimpleNamespace(name="SAT493M", value="SAT493M")  # as a member of Meta's enum


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dinov3_vitb16", {}, ("dinov3_vitb16", dict(weights=None, device="cpu"))),
        ("dino_vits8", dict(pretrained=True), ("dino_vits8", dict(weights=None, device="cpu"))),
        ("dinov3_vitb16", dict(weights=True), ("dinov3_vitb16", dict(weights=None, device="cpu"))),
        ("dinov3_vitb16", dict(weights=False), ("dinov3_vitb16", "random")),
        ("dinov2_vits14", dict(pretrained=False), ("dinov2_vits14", "random")),
        ("dinov3_vitl16", dict(weights="LVD1689M"), ("dinov3_vitl16", dict(weights=None, device="cpu"))),
        ("dinov3_vitl16", dict(weights="SAT493M"), ("dinov3_vitl16_sat493m", dict(weights=None, device="cpu"))),
        ("dinov3_vit7b16", dict(weights=SAT), ("dinov3_vit7b16_sat493m", dict(weights=None, device="cpu"))),
        ("dinov3_vitb16", dict(weights="a/b", check_hash=True), ("dinov3_vitb16", dict(weights="a/b", device="cpu"))),
        ("lingbot_vits16", dict(weights=Path("x"), device="cuda", dtype="bfloat16"),
         ("lingbot_vits16", dict(weights=Path("x"), device="cuda", dtype="bfloat16"))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_which_weights(
    name: str, options: dict[str, Any], expected: tuple[str, object], asked: list[tuple[str, object]]
) -> None:
    load(name, **options)
    assert asked == [expected]


def test_pretrained_may_be_given_by_place(asked: list[tuple[str, object]]) -> None:
    load("dino_vitb8", False)
    assert asked == [("dino_vitb8", "random")]


def test_wrong_options() -> None:
    text = complaint(InputTypeError, lambda: load("nano", pretrained=False, img_size=96))
    assert text == "pretrained=False gives random weights and takes no other option, got img_size; leave them out"
    assert "weights" in complaint(InputTypeError, lambda: load("nano", pretrained=False, weights="x.pth"))
    assert "unknown model 'dinov3_vits16_sat493m'" in complaint(
        ModelNotFoundError, lambda: load("dinov3_vits16", weights="SAT493M")
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'img_size'"):
        load("dinov3_vits16", img_size=96)


# --- where the code is ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a repository archive with one folder at the top, and unpacks it as torch.hub does."""
    folder = tmp_path_factory.mktemp("archive")
    with zipfile.ZipFile(folder / "main.zip", "w") as packed:
        for top in ("dinov3_infer", "kernels", "examples", "hubconf.py", "pyproject.toml"):
            for path in (ROOT / top).rglob("*") if (ROOT / top).is_dir() else [ROOT / top]:
                if path.is_file() and "__pycache__" not in path.parts:
                    packed.write(path, Path("dinov3_infer-main") / path.relative_to(ROOT))
    with zipfile.ZipFile(folder / "main.zip") as packed:
        getattr(torch.hub, "_safe_extract_zip", zipfile.ZipFile.extractall)(packed, folder)
    return folder / "dinov3_infer-main"


SCRIPT = """
import importlib.util, json, sys, torch
for name in sys.argv[3:]:
    sys.modules[name] = None  # as if it were not installed
path, known = list(sys.path), set(sys.modules)
model = torch.hub.load(sys.argv[1], "dinov3_vits16", source="local", weights=sys.argv[2], verbose=False)
unchanged = sys.path == path
new = {name.split(".")[0] for name in set(sys.modules) - known}
features = model.extract_features(torch.zeros(3, 32, 32, dtype=torch.uint8), size=32)  # imports what is lazy
import dinov3_infer
kernels = sys.modules.get("dinov3_infer_kernels")
print(json.dumps({
    "package": dinov3_infer.__file__, "kernels": kernels and kernels.__file__, "unchanged": unchanged,
    "shape": list(model(torch.zeros(1, 3, 32, 32)).shape), "shadowed": importlib.util.find_spec("kernels") is not None,
    "hubconf": "hubconf" in sys.modules, "peers": sorted({"transformers", "timm", "torchvision"} & new),
}))
"""


def in_another_process(folder: Path, weights: Path, *missing: str, path: str = "") -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
    script = f"import dinov3_infer\n{SCRIPT}" if path else SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", script, folder, weights, *missing],
        capture_output=True, text=True, env=environment, cwd=folder.parent, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_from_an_archive(archive: Path, files: dict[str, Path]) -> None:
    """Code and kernels come from the archive; the path is restored, and no `kernels` package is shadowed."""
    found = in_another_process(archive, files["dinov3_vits16"])
    assert found["package"] == str(archive / "dinov3_infer" / "__init__.py")
    assert found["kernels"] == str(archive / "kernels/dinov3_infer_kernels/__init__.py")
    assert found["unchanged"] and found["shape"] == [1, 384] and found["peers"] == []
    assert found["shadowed"] == ("kernels" in packages_distributions()), "import kernels is Hugging Face's business"


def test_without_what_is_optional(archive: Path, files: dict[str, Path]) -> None:
    """Without Triton and other implementations it loads and runs."""
    found = in_another_process(archive, files["dinov3_vits16"], "triton", "transformers", "timm", "torchvision", "peft")
    assert found["kernels"] and found["unchanged"] and found["shape"] == [1, 384]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_package_and_kernels_are_of_one_version(archive: Path, files: dict[str, Path]) -> None:
    """If another copy was imported before, that copy is used, with its own kernels."""
    found = in_another_process(archive, files["dinov3_vits16"], path=str(ROOT))
    assert found["package"] == str(ROOT / "dinov3_infer" / "__init__.py")
    assert found["kernels"] == str(ROOT / "kernels" / "dinov3_infer_kernels" / "__init__.py")
    assert found["unchanged"]
