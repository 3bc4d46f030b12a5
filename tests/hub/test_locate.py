"""Names lead to weights: a path, the cache, or the hub, with the real client and a hub on this machine."""

import shutil
from pathlib import Path

import pytest
import torch
from hub_client import (
    Client,
    client as client,
    cut_off as cut_off,
    files_of,
    hub as hub,
    offline as offline,
    small as small,
)
from hub_server import READER, Hub
from safetensors.torch import load_file, save_file

from dinov3_infer import Backbone, ModelNotFoundError
from dinov3_infer.errors import InputTypeError, MissingFileError, UnsupportedError
from dinov3_infer.hub.locate import HubOptions, locate

OWNERS = "facebook/dinov3-vits16-pretrain-lvd1689m"


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
        ("lingbot_vits16", "robbyant/lingbot-vision-vit-small"),
        ("robbyant/lingbot-vision-vit-giant", "robbyant/lingbot-vision-vit-giant"),
        ("eupe_vitt16", "facebook/EUPE-ViT-T"),
        ("facebook/EUPE-ViT-B", "facebook/EUPE-ViT-B"),
        ("timm/vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", "timm/vit_base_patch16_dinov3_qkvb.eupe_lvd1689m"),
        ("someone/dinov3-linear-finetune", "someone/dinov3-linear-finetune"),
        ("hf-hub:someone/some-dino", "someone/some-dino"),
        ("https://huggingface.co/facebook/dinov2-small", "facebook/dinov2-small"),
        ("https://huggingface.co/someone/some-dino/tree/main", "someone/some-dino"),
    ],
)
def test_which_repository_a_name_leads_to(monkeypatch: pytest.MonkeyPatch, name: str, repository: str) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("dinov3_infer.hub.locate._repository", lambda name, *_: asked.append(name) or Path(name))
    locate(name, HubOptions())
    assert asked == [repository]


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no weights at '/"):
        Backbone.from_pretrained(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=r"absent\.pth"):
        Backbone.from_pretrained("absent.pth")
    with pytest.raises(ModelNotFoundError, match="'vits-16': did you mean 'vits16' or .*list_models"):
        Backbone.from_pretrained("vits-16")
    with pytest.raises(UnsupportedError, match="ConvNeXt"):
        Backbone.from_pretrained("facebook/convnext-tiny-224")


@pytest.mark.parametrize("wrong", [None, 7, b"vits16", ""], ids=["none", "int", "bytes", "empty"])
def test_what_is_neither_name_nor_path(wrong: object) -> None:
    with pytest.raises(InputTypeError, match="a model is a name of list_models.*, a hub id, a path or a link; got"):
        Backbone.from_pretrained(wrong)
    if wrong:
        with pytest.raises(InputTypeError, match="weights are a path or a link, got (int|bytes)"):
            Backbone.from_pretrained("vits16", weights=wrong)


def test_a_path_wins_over_a_name(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small, tmp_path / "vits16")
    monkeypatch.chdir(tmp_path)
    loaded = Backbone.from_pretrained("vits16")
    assert loaded.embed_dim == 64 and torch.equal(loaded.cls_token, Backbone.from_pretrained(small).cls_token)


@pytest.mark.parametrize("name", ["nano", "vits16", OWNERS])
@pytest.mark.parametrize("there", ["empty", "vectors", "a file"])
def test_what_holds_no_weights_does_not_take_the_place_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: str
) -> None:
    asked = []
    monkeypatch.setattr("dinov3_infer.hub.locate._repository", lambda name, *_: asked.append(name) or Path(name))
    monkeypatch.setattr("dinov3_infer.hub.locate._in_the_package", lambda info: asked.append(info.name) or Path("x"))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    if there == "a file":
        place.write_text("notes")
    else:
        place.mkdir()
        if there == "vectors":
            (place / "shard_0.npy").write_bytes(b"x")
            (place / "config.json").write_text("{}")
    locate(name, HubOptions())
    assert asked == [name if name != "vits16" else OWNERS]
    assert locate(f"./{name}", HubOptions()) == (Path(name), None)


@pytest.mark.parametrize("file", ["model.safetensors", "x.pth", "model.safetensors.index.json"])
def test_a_folder_with_weights_takes_the_place_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vits16").mkdir()
    (tmp_path / "vits16" / file).write_bytes(b"damaged")
    assert locate("vits16", HubOptions()) == (Path("vits16"), None)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_local_files_are_mapped_and_never_copied(tmp_path: Path, small: Path, client: Client, kind: str) -> None:
    cache, source = tmp_path / "cache", tmp_path / "model"
    cache.mkdir()
    shutil.copytree(small, source)
    named = source if kind == "folder" else source / "model.safetensors"
    before = sorted(p.name for p in source.iterdir())
    outcome = client("load", named, cache_dir=cache)
    assert outcome.value == Backbone.from_pretrained(small).fingerprint()
    assert list(cache.iterdir()) == [] and sorted(p.name for p in source.iterdir()) == before
    one_file = Backbone.from_pretrained(small).save_pretrained(tmp_path / "meta.safetensors", layout="meta")
    assert client("mapped", one_file, cache_dir=cache).value is True


def test_downloaded_once_then_never_asked_again(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add("someone/some-dino", files_of(small))
    first = client("load", "someone/some-dino", cache_dir=tmp_path)
    assert first.value == Backbone.from_pretrained(small).fingerprint()
    assert "/someone/some-dino/resolve/main/config.json" in hub.asked("GET")
    hub.seen.clear()
    again = client("load", "someone/some-dino", cache_dir=tmp_path)
    assert again.value == first.value and hub.seen == [] and again.seconds < 2


def test_the_licence_is_said_once(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add(OWNERS, files_of(small), gated=True)
    first = client("locate", "vits16", cache_dir=tmp_path, token=READER)
    assert first.value[1] == "dinov3_vits16" and Path(first.value[0], "model.safetensors").is_file()
    assert first.said == [f"dinov3_vits16: downloaded from '{OWNERS}'; the licence of these weights: DINOv3 License"]
    hub.seen.clear()
    again = client("locate", "vits16", cache_dir=tmp_path)  # what is here needs no token
    assert again.said == [] and again.value == first.value and hub.seen == []


@pytest.mark.parametrize("how", ["page", "file"])
def test_a_link_into_the_hub_says_the_licence_too(
    how: str, tmp_path: Path, small: Path, hub: Hub, client: Client
) -> None:
    hub.add(OWNERS, files_of(small), gated=True)
    link = f"{hub.url}/{OWNERS}" + ("" if how == "page" else "/resolve/main/model.safetensors?download=true")
    outcome = client("locate", link, cache_dir=tmp_path, token=READER)
    assert len(outcome.said) == 1 and outcome.said[0].endswith("DINOv3 License")


def test_what_lies_under_a_name_has_to_be_that_model(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add(OWNERS, files_of(small))
    outcome = client("load", "vits16", cache_dir=tmp_path)
    assert issubclass(outcome.error, ValueError) and "asked for dinov3_vits16" in outcome.text


def test_a_token_goes_to_the_hub_and_nowhere_else(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add("someone/private", files_of(small), private=True)
    assert client("load", "someone/private", cache_dir=tmp_path, token=READER).value
    sent = {path.startswith("/elsewhere/"): "authorization" in headers for _, path, headers in hub.seen}
    assert sent == {False: True, True: False}


@pytest.mark.parametrize("who", ["offline", "cut_off", "local_files_only"])
def test_what_is_cached_needs_no_network(
    tmp_path: Path, small: Path, hub: Hub, client: Client, who: str, request: pytest.FixtureRequest
) -> None:
    """This holds even if another library cached only the weights: the configs beside them are requested once."""
    files = files_of(small)
    repository = hub.add("someone/some-dino", files)
    client("load", "someone/some-dino", cache_dir=tmp_path)
    other, options = (client, {who: True}) if who == "local_files_only" else (request.getfixturevalue(who), {})
    outcome = other("load", "someone/some-dino", cache_dir=tmp_path, **options)
    assert outcome.value and outcome.seconds < 2 and outcome.said == []
    snapshot = tmp_path / "models--someone--some-dino" / "snapshots" / repository.refs["main"]
    (snapshot / "preprocessor_config.json").unlink()
    hub.seen.clear()
    outcome = other("load", "someone/some-dino", cache_dir=tmp_path, **options)
    assert outcome.value and outcome.seconds < 2 and hub.seen == []
    assert len(outcome.said) == 1 and "preprocessor_config.json is not cached" in outcome.said[0]


def test_what_another_library_left_out_is_fetched_at_the_same_commit(
    tmp_path: Path, small: Path, hub: Hub, client: Client
) -> None:
    files = files_of(small)
    repository = hub.add("someone/some-dino", files)
    client("load", "someone/some-dino", cache_dir=tmp_path)
    snapshot = tmp_path / "models--someone--some-dino" / "snapshots" / repository.refs["main"]
    (snapshot / "preprocessor_config.json").unlink()
    repository.commit({"config.json": b"{}"})  # main has moved on
    assert client("load", "someone/some-dino", cache_dir=tmp_path).said == []
    assert (snapshot / "preprocessor_config.json").is_file() and len(list(snapshot.parent.iterdir())) == 1


def test_main_stays_what_it_was_until_it_is_downloaded_anew(
    tmp_path: Path, small: Path, hub: Hub, client: Client
) -> None:
    repository = hub.add("someone/some-dino", files_of(small))
    old_commit = repository.refs["main"]
    old = client("load", "someone/some-dino", cache_dir=tmp_path).value
    changed = Backbone.from_config(Backbone.from_pretrained(small).config, seed=2)
    new_files = files_of(changed.save_pretrained(tmp_path / "new"))
    repository.commit(new_files)
    assert client("load", "someone/some-dino", cache_dir=tmp_path).value == old
    client("refresh", "someone/some-dino", cache_dir=tmp_path)
    assert client("load", "someone/some-dino", cache_dir=tmp_path).value == changed.fingerprint() != old
    assert client("load", "someone/some-dino", cache_dir=tmp_path, revision=old_commit).value == old


def test_a_push_in_the_midst_of_a_download_mixes_nothing(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    files = files_of(small)
    repository = hub.add("someone/some-dino", files)
    other = Backbone.from_config(Backbone.from_pretrained(small).config, seed=2).save_pretrained(tmp_path / "other")
    hub.after["/someone/some-dino/resolve/main/config.json"] = lambda: repository.commit(files_of(other))
    outcome = client("load", "someone/some-dino", cache_dir=tmp_path / "cache")
    assert outcome.value == Backbone.from_pretrained(small).fingerprint() and len(repository.commits) == 2


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "commit"])
def test_revisions(tmp_path: Path, small: Path, hub: Hub, client: Client, revision: str) -> None:
    """A branch, a pull request and a commit are cached separately."""
    repository = hub.add("someone/some-dino", {"README.md": b"nothing yet"})
    commit = repository.commit(files_of(small), branch="v1" if revision == "commit" else revision)
    named = commit if revision == "commit" else revision
    assert client("load", "someone/some-dino", cache_dir=tmp_path, revision=named).value
    hub.seen.clear()
    assert client("load", "someone/some-dino", cache_dir=tmp_path, revision=named).value and hub.seen == []


def test_shards(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    """All shards are downloaded, and a cache without one of them is incomplete."""
    tensors = load_file(small / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    files = files_of(small)
    del files["model.safetensors"]
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, tmp_path / file)
        files[file] = (tmp_path / file).read_bytes()
    listed = {name: file for file, chosen in parts.items() for name in chosen}
    files["model.safetensors.index.json"] = str({"weight_map": listed}).replace("'", '"').encode()
    repository = hub.add("someone/sharded", files)
    expected = Backbone.from_pretrained(small).fingerprint()
    cache = tmp_path / "cache"
    assert client("load", "someone/sharded", cache_dir=cache).value == expected
    hub.seen.clear()
    assert client("load", "someone/sharded", cache_dir=cache).value == expected and hub.seen == []
    snapshot = cache / "models--someone--sharded" / "snapshots" / repository.refs["main"]
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    assert client("load", "someone/sharded", cache_dir=cache).value == expected


def test_an_old_repository_with_a_pickle(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    files = files_of(small)
    torch.save(load_file(small / "model.safetensors"), tmp_path / "m.bin")
    del files["model.safetensors"]
    hub.add("someone/old", files | {"pytorch_model.bin": (tmp_path / "m.bin").read_bytes()})
    expected = Backbone.from_pretrained(small).fingerprint()
    assert client("load", "someone/old", cache_dir=tmp_path / "cache").value == expected
    hub.seen.clear()
    assert client("load", "someone/old", cache_dir=tmp_path / "cache").value == expected and hub.seen == []


def test_several_weights_in_one_repository(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    """Files without a usual name are given by the link to their page or download."""
    weights = files_of(small)["model.safetensors"]
    hub.add("someone/backups", {"a.safetensors": weights, "old/b.safetensors": weights}, private=True)
    outcome = client("locate", "someone/backups", cache_dir=tmp_path, token=READER)
    assert outcome.error is ModelNotFoundError
    assert "a.safetensors, old/b.safetensors; give the link of one of these with weights=" in outcome.text
    for where in ("resolve", "blob"):
        link = f"{hub.url}/someone/backups/{where}/main/old/b.safetensors"
        path = Path(client("locate", link, cache_dir=tmp_path, token=READER).value[0])
        assert path.read_bytes() == weights
    hub.seen.clear()
    assert client("locate", link, cache_dir=tmp_path).value[0] == str(path) and hub.seen == []


@pytest.mark.parametrize("file", ["teacher_checkpoint_load.pt", "GPFM.pth", "odd.safetensors", "weights/odd.pth"])
def test_the_only_weights_of_a_repository(
    file: str, tmp_path: Path, small: Path, hub: Hub, client: Client, offline: Client
) -> None:
    """A single weights file of any name is used, and is found in the cache without a request."""
    bb = Backbone.from_pretrained(small)
    own = bb.save_pretrained(
        tmp_path / Path(file).with_suffix(".safetensors" if "safe" in file else ".pth").name, "meta"
    )
    hub.add("someone/odd", {file: own.read_bytes(), "README.md": b"#"})
    assert client("load", "someone/odd", cache_dir=tmp_path / "cache").value == bb.fingerprint()
    if "/" not in file:
        hub.seen.clear()
        assert client("load", "someone/odd", cache_dir=tmp_path / "cache").value == bb.fingerprint()
        assert offline("load", "someone/odd", cache_dir=tmp_path / "cache").value == bb.fingerprint()
        assert not hub.asked("GET")
    hub.add("someone/odd", {file: own.read_bytes(), "another.pth": own.read_bytes()})
    outcome = client("load", "someone/odd", cache_dir=tmp_path / "other")
    assert outcome.error is ModelNotFoundError and "give the link of one of these" in outcome.text


def test_a_file_of_the_cache_is_not_taken_for_a_repository(
    tmp_path: Path, small: Path, hub: Hub, client: Client
) -> None:
    """A file that was downloaded by link may have others beside it on the hub."""
    weights = files_of(small)["model.safetensors"]
    hub.add("someone/two", {"a.safetensors": weights, "b.safetensors": weights})
    client("locate", f"{hub.url}/someone/two/resolve/main/a.safetensors", cache_dir=tmp_path)
    assert client("locate", "someone/two", cache_dir=tmp_path).error is ModelNotFoundError


def test_owners_of_odd_names_by_their_id(tmp_path: Path, hub: Hub, client: Client) -> None:
    """Name, licence and number of heads come from the zoo."""
    bb = Backbone.from_config("eupe_vitt16", seed=0)
    content = bb.save_pretrained(tmp_path / "x.pth", "meta").read_bytes()
    hub.add("facebook/EUPE-ViT-T", {"EUPE-ViT-T.pt": content})
    for name in ("eupe_vitt16", "facebook/EUPE-ViT-T", f"{hub.url}/facebook/EUPE-ViT-T/resolve/main/EUPE-ViT-T.pt"):
        outcome = client("locate", name, cache_dir=tmp_path / "cache")
        assert outcome.value[1] == "eupe_vitt16"
    assert client("load", "eupe_vitt16", cache_dir=tmp_path / "new").value == bb.fingerprint()
    found = client("locate", "eupe_vitt16", cache_dir=tmp_path / "newer")
    assert any("FAIR Noncommercial Research License" in line for line in found.said)
