"""A model goes to the hub and back, with a model card."""

import json
from dataclasses import replace
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
from hub_server import READER, SECRET, WRITER, Hub

from dinov3_infer import MODELS, Backbone, GatedModelError, InputError, OfflineError
from dinov3_infer.hub.publish import model_card
from dinov3_infer.zoo import OWN, list_models


def header_of(card: str) -> dict[str, object]:
    """The YAML header, as the hub reads it."""
    import yaml  # comes with huggingface_hub

    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def pushed(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs[branch]]


@pytest.mark.parametrize("name", list_models())
def test_the_header_of_a_card(name: str) -> None:
    info = MODELS[name]
    with torch.device("meta"):
        model = Backbone(info.config, info)
    card = model_card(model, "someone/mine", info)
    header = header_of(card)
    expected = dict(library_name="transformers", pipeline_tag="image-feature-extraction")
    expected["tags"] = ["dinov3_infer", info.family]
    if info.licence == "DINOv3 License":
        link = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
        expected |= dict(license="other", license_name="dinov3-license", license_link=link)
    else:
        expected |= dict(license={"eupe": "fair-noncommercial-research-license"}.get(info.family, "apache-2.0"))
    if info.hub_id:
        expected |= dict(base_model=info.hub_id)
    assert header == expected
    assert f"architecture of `{name}`" in card and f"`{name}` applies: {info.licence}." in card


def test_a_card_of_an_architecture_of_ones_own_claims_no_licence(small: Path) -> None:
    card = model_card(Backbone.from_pretrained(small), "someone/mine", None)
    assert set(header_of(card)) == {"library_name", "pipeline_tag", "tags"} and "icence" not in card


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_weights_that_began_as_random_ones_are_their_authors(layout: str, tmp_path: Path) -> None:
    """Neither card nor config gives weights trained from scratch a released licence, even after saving again."""
    info = replace(MODELS["dinov3_vits16"], licence=OWN)
    with torch.random.fork_rng():
        bb = Backbone(info.config, info).eval()
    for i in range(2):
        folder = bb.save_pretrained(tmp_path / str(i), layout)
        assert (
            "icen" not in (folder / "config.json").read_text()
            and "lvd1689m" not in (folder / "config.json").read_text()
        )
        bb = Backbone.from_pretrained(folder, device="cpu")
        assert bb.info == info and bb.preprocess.size == 256
    card = model_card(bb, "someone/mine", bb.info)
    assert not {"license", "license_name", "license_link", "base_model"} & set(header_of(card))
    assert "architecture of `dinov3_vits16`" in card and "licence is\nthe author's choice" in card
    assert "DINOv3 License" not in card


def test_there_and_back(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    """The loaded model equals the pushed one, and the snippets of the card name the repository."""
    outcome = client("push", small, "writer/mine", token=WRITER)
    assert outcome.value.startswith(f"{hub.url}/writer/mine/commit/")
    files = pushed(hub, "writer/mine")
    pooling = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}  # of sentence-transformers
    assert set(files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} | pooling
    assert files["README.md"].decode().count('from_pretrained("writer/mine")') == 3
    assert {name: files[name] for name in files_of(small)} == files_of(small)
    again = client("load", "writer/mine", cache_dir=tmp_path)
    assert again.value == Backbone.from_pretrained(small).fingerprint()


def test_transformers_loads_what_was_pushed(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    from transformers import AutoModel

    client("push", small, "writer/mine", token=WRITER)
    for name, content in pushed(hub, "writer/mine").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    theirs, ours = AutoModel.from_pretrained(tmp_path), Backbone.from_pretrained(small)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(theirs(pixels).pooler_output, ours(pixels).cls_token, atol=1e-5)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())  # reading it there needs torchvision
    assert tuple(processor["image_mean"]) == ours.preprocess.mean


def test_a_name_without_its_owner(small: Path, hub: Hub, client: Client) -> None:
    client("push", small, "mine", token=WRITER, private=True)
    assert hub.repositories["writer/mine"].private
    assert b'from_pretrained("writer/mine")' in pushed(hub, "writer/mine")["README.md"]


def test_a_card_that_is_there_is_left_alone(small: Path, hub: Hub, client: Client) -> None:
    """An existing card stays unless a new one is given; old shards are removed."""
    before = {"README.md": b"# mine", "model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"0"}
    hub.add("writer/mine", before | {"notes.txt": b"keep"})
    client("push", small, "writer/mine", token=WRITER)
    files = pushed(hub, "writer/mine")
    assert files["README.md"] == b"# mine" and files["notes.txt"] == b"keep"
    assert sorted(name for name in files if "safetensors" in name) == ["model.safetensors"]
    client("push", small, "writer/mine", token=WRITER, card="# new", commit_message="again")
    assert pushed(hub, "writer/mine")["README.md"] == b"# new"


def test_a_branch(small: Path, hub: Hub, client: Client) -> None:
    hub.add("writer/mine", {"README.md": b"# mine"})
    client("push", small, "writer/mine", token=WRITER, revision="trial")
    assert "model.safetensors" in pushed(hub, "writer/mine", "trial")
    assert list(pushed(hub, "writer/mine")) == ["README.md"]


@pytest.mark.parametrize(
    "name, token, kind, words",
    [
        ("a/b", READER, GatedModelError, r"refuses to write to 'a/b' \(HTTP 403\); log in with 'hf auth login' and a"),
        ("a/b", f"hf_ended{SECRET}", GatedModelError, r"hub refuses to write to 'a/b' \(HTTP 40[13]\)"),
        ("a/b", False, GatedModelError, r"hub refuses to write to 'a/b' \(HTTP 401\)"),
        ("a/b", True, InputError, "pushing needs a token, and none is stored; log in with 'hf auth login'"),
        ("a/b/c", WRITER, InputError, "a repository is 'name' or 'org/name'; got 'a/b/c'"),
        ("a b", WRITER, InputError, "a repository is 'name' or 'org/name'; got 'a b'"),
    ],
    ids=["may not write", "ended token", "no token", "none stored", "two slashes", "white space"],
)
def test_what_is_refused(
    name: str, token: str | bool, kind: type, words: str, small: Path, hub: Hub, client: Client
) -> None:
    client.fails(kind, words, "push", small, name, token=token)
    assert hub.repositories == {}


def test_without_a_network(small: Path, hub: Hub, offline: Client, cut_off: Client) -> None:
    words = r"'a/b' cannot be written \(HF_HUB_OFFLINE=1\); write a folder with save_pretrained"
    offline.fails(OfflineError, words, "push", small, "a/b", token=WRITER)
    words = r"'a/b' could not be written \(Connect\w+\); try again, or write a folder with save_pretrained"
    assert cut_off.fails(OfflineError, words, "push", small, "a/b", token=WRITER).seconds < 5
