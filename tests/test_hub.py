"""Names lead to weights: the cache first, then the hub, and a sentence where neither has them."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from dinov3_infer import Backbone, GatedModelError, ModelNotFoundError, OfflineError
from dinov3_infer.errors import MissingFileError, UnsupportedError
from dinov3_infer.hub import HubOptions, locate

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached_repository(cache: Path, repository: str, source: Path) -> None:
    """Puts files where huggingface_hub looks for those of a repository."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    shutil.copytree(source, root / "snapshots" / REVISION)


def raising(error: Exception) -> object:
    def download(*_: object, **__: object) -> str:
        raise error

    return download


def response(status: int) -> Any:
    """What all HTTP clients of huggingface_hub's versions have in common."""
    request = SimpleNamespace(url="https://example.org/file?X-Signature=secret", method="GET", headers={})
    return SimpleNamespace(status_code=status, headers={}, request=request, url=request.url)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Backbone.from_config("nano", seed=1).save_pretrained(tmp_path_factory.mktemp("nano"))


def test_a_hub_id_in_the_cache_loads_without_a_network(tmp_path: Path, small_model: Path) -> None:
    cached_repository(tmp_path, "someone/some-dino", small_model)
    loaded = Backbone.from_pretrained("someone/some-dino", cache_dir=tmp_path)
    assert loaded.fingerprint() == Backbone.from_pretrained(small_model).fingerprint()


def test_a_name_leads_to_its_owners_repository(tmp_path: Path, small_model: Path) -> None:
    cached_repository(tmp_path, "facebook/dinov3-vits16-pretrain-lvd1689m", small_model)
    path, info = locate("vits16", HubOptions(cache_dir=tmp_path))
    assert info is not None and info.name == "dinov3_vits16" and (path / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="asked for dinov3_vits16"):  # what lies there is another model
        Backbone.from_pretrained("vits16", cache_dir=tmp_path)


def test_without_cache_and_network(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="no path here and not in the cache.*weights=PATH") as caught:
        Backbone.from_pretrained("dinov2_vits14", cache_dir=tmp_path)
    assert isinstance(caught.value, FileNotFoundError)


def test_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", raising(GatedRepoError("x", response=response(403))))
    with pytest.raises(GatedModelError, match="accept the licence.*hf auth login.*weights=PATH.*timm") as caught:
        Backbone.from_pretrained("vitl16")
    assert isinstance(caught.value, PermissionError) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (RepositoryNotFoundError("x", response=response(404)), ModelNotFoundError, "no model 'a/b' that you can see"),
        (HfHubHTTPError("x", response=response(500)), OfflineError, r"failed \(HTTP 500\)"),
        (EntryNotFoundError("x"), ModelNotFoundError, "holds no model.safetensors"),
    ],
    ids=["no such repository", "server error", "no weights inside"],
)
def test_what_a_hub_can_answer(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", raising(error))
    with pytest.raises(kind, match=words) as caught:
        locate("a/b", HubOptions())
    assert "secret" not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no weights at '/"):
        Backbone.from_pretrained(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=r"absent\.pth"):
        Backbone.from_pretrained("absent.pth")
    with pytest.raises(ModelNotFoundError, match="did you mean"):
        Backbone.from_pretrained("vits-16")
    with pytest.raises(UnsupportedError, match="ConvNeXt"):
        Backbone.from_pretrained("facebook/dinov3-convnext-tiny-pretrain-lvd1689m")
    with pytest.raises(ModelNotFoundError, match="not|no weights of 'nano'"):
        Backbone.from_pretrained("nano")


def test_a_path_wins_over_a_name(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small_model, tmp_path / "vits16")
    monkeypatch.chdir(tmp_path)
    loaded = Backbone.from_pretrained("vits16")
    assert loaded.embed_dim == 192 and torch.equal(loaded.cls_token, Backbone.from_pretrained(small_model).cls_token)


@pytest.mark.parametrize(
    "name, repository",
    [
        ("vitb16", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("timm/vit_base_patch16_dinov3.lvd1689m", "timm/vit_base_patch16_dinov3.lvd1689m"),
        ("hf-hub:timm/vit_base_patch16_dinov3_qkvb.lvd1689m", "timm/vit_base_patch16_dinov3_qkvb.lvd1689m"),
        ("vit_base_patch16_dinov3.lvd1689m", "timm/vit_base_patch16_dinov3.lvd1689m"),
        ("vit_small_patch14_reg4_dinov2", "timm/vit_small_patch14_reg4_dinov2.lvd142m"),
        ("timm/vit_small_patch16_lingbot.robbyant", "belfner/vit_small_patch16_lingbot.robbyant"),
        ("lingbot_vits16", "belfner/vit_small_patch16_lingbot.robbyant"),
        ("someone/dinov3-linear-finetune", "someone/dinov3-linear-finetune"),
    ],
)
def test_which_repository_a_name_leads_to(monkeypatch: pytest.MonkeyPatch, name: str, repository: str) -> None:
    asked = []

    def download(repo_id: str, file: str, **_: object) -> str:
        asked.append(repo_id)
        return f"/cache/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    locate(name, HubOptions())
    assert set(asked) == {repository}
