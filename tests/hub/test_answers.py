"""Answers of a hub instead of weights, and the resulting errors; the client checks for secrets in them."""

from pathlib import Path

import huggingface_hub
import pytest
from hub_client import (
    Client,
    client as client,
    cut_off as cut_off,
    files_of,
    hub as hub,
    offline as offline,
    small as small,
)
from hub_server import READER, SECRET, STRANGER, Hub

from dinov3_infer import GatedModelError, InputError, ModelNotFoundError, OfflineError
from dinov3_infer.hub.answers import HubOptions, explain

VITS, VITL = (f"facebook/dinov3-{name}-pretrain-lvd1689m" for name in ("vits16", "vitl16"))
CONFIG = "/a/b/resolve/main/config.json"
PATIENT = int(huggingface_hub.__version__.split(".")[0]) > 1  # tries again, in newer versions of 1 too

# setup of the hub; request; error
REFUSALS = {
    "gated, no token": (
        dict(gated=True), "vitl16", {}, GatedModelError,
        rf"access to '{VITL}' is gated, and no token was sent: accept the licence on its page and log in with "
        r"'hf auth login', or pass weights=PATH with a file .*timm's copy.*'timm/vit_large_patch16_dinov3.lvd1689m'$",
    ),
    "gated, token of somebody else": (
        dict(gated=True), VITL, dict(token=STRANGER), GatedModelError,
        "gated, and the token that was sent has no access",
    ),
    "a gated copy is not proposed again": (
        dict(gated=True), "timm/vit_large_patch16_dinov3.lvd1689m", {}, GatedModelError, "file that you already have$",
    ),
    "gated, of nobody known": (dict(gated=True), "a/b", {}, GatedModelError, "file that you already have$"),
    "a fine-grained token": (
        dict(play={CONFIG: ["forbidden", "..."]}), "a/b", dict(token=READER), GatedModelError,
        r"refused access to 'a/b' \(HTTP 403\); .*fine-grained token the permission to read gated",
    ),
    "a token that has ended": (
        {}, "a/b", dict(token=f"hf_ended{SECRET}"), ModelNotFoundError,
        r"refused the token for 'a/b' \(HTTP 401\); log in again .*token=False",
    ),
    "a token with its line break": (
        {}, "a/b", dict(token=f"hf_{SECRET}\n"), InputError,
        "token is empty or contains white",
    ),
    "an empty token": (
        {}, "a/b", dict(token=""), InputError,
        "token is empty .* give the token alone, or None for the stored",
    ),
    "a stored token that is not there": (
        {}, "a/b", dict(token=True), InputError,
        "none is stored; log in with 'hf auth",
    ),
    "private, no token": (
        dict(private=True), "a/b", {}, ModelNotFoundError,
        r"'a/b' is no existing path, and the hub shows no model of that name \(no token was sent\); check",
    ),
    "private, token of somebody else": (
        dict(private=True), "a/b", dict(token=STRANGER), ModelNotFoundError,
        "of that name with the token that was sent; check",
    ),
    "no such repository": (None, "a/b", {}, ModelNotFoundError, "no model of that name"),
    "no such repository, with a token": (
        None, "a/b", dict(token=READER), ModelNotFoundError,
        "with the token that was",
    ),
    "no id at all": (
        None, "a b/c--d", {}, ModelNotFoundError,
        "no existing path and no hub id; .* 'org/name'",
    ),
    "no such revision": (
        {}, "a/b", dict(revision="v9"), ModelNotFoundError,
        "'a/b' has no revision 'v9'; give one of its branches",
    ),
    "no such file": (
        {}, "{hub}/a/b/resolve/main/c.pth", {}, ModelNotFoundError, "'a/b' has no such file; see the list on its page",
    ),
    "an empty repository": (
        dict(files={}), "a/b", {}, ModelNotFoundError,
        "'a/b' holds no model.safetensors and no pytorch_model.bin, nor any other weights file; give a file with",
    ),
    "another kind of model": (
        dict(files={"README.md": b"#", "flax_model.msgpack": b"0", "tf.h5": b"0"}), "a/b", {}, ModelNotFoundError,
        "nor any other weights file",
    ),
    "a login page instead of the hub": (
        dict(play={CONFIG: ["to a login page", "..."]}), "a/b", {}, OfflineError,
        "answered for 'a/b' is no hub, but perhaps a login page or a proxy; .*HF_ENDPOINT.*weights=PATH",
    ),
    "a page instead of the hub": (
        dict(play={CONFIG: ["html", "..."]}), "a/b", {}, OfflineError, "the server that answered for 'a/b' is no hub",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_hub_can_answer(case: str, tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    setup, name, options, kind, words = REFUSALS[case]
    if setup is not None:
        access = {key: setup.get(key, False) for key in ("gated", "private")}
        for repository in {"a/b", VITL, "timm/vit_large_patch16_dinov3.lvd1689m"}:
            hub.add(repository, setup.get("files", files_of(small)), **access)
        for path, troubles in setup.get("play", {}).items():
            hub.play(path, *troubles)
    outcome = client.fails(kind, words, "locate", name.replace("{hub}", hub.url), cache_dir=tmp_path, **options)
    assert outcome.seconds < 2
    assert not any(path.is_file() for path in tmp_path.rglob("snapshots/*/*.safetensors"))


@pytest.mark.parametrize("name, repository", [("a/b", "a/b"), ("dinov2_vits14", "facebook/dinov2-small")])
def test_without_a_network(name: str, repository: str, tmp_path: Path, cut_off: Client) -> None:
    """The error comes at once, without the half minute of retries of huggingface_hub."""
    outcome = cut_off("load", name, cache_dir=tmp_path, revision="v1")
    assert outcome.error is OfflineError and issubclass(outcome.error, FileNotFoundError)
    assert outcome.seconds < 2
    start = f"'{repository}' is no existing path and not in the cache '{tmp_path}', and the hub cannot be reached ("
    assert outcome.text.startswith(start)
    assert outcome.text.endswith(
        f"; run 'hf download {repository} --revision v1' where the hub can be reached, copy the cache, or give "
        "weights=PATH"
    )


@pytest.mark.parametrize("name", ["a/b", "vitb16", "{hub}/a/b/resolve/main/model.safetensors", "{hub}/c.pth"])
def test_told_not_to_ask(name: str, tmp_path: Path, small: Path, hub: Hub, client: Client, offline: Client) -> None:
    hub.add("a/b", files_of(small))
    name = name.replace("{hub}", hub.url)
    for who, options, why in (
        (offline, {}, r"was not contacted \(HF_HUB_OFFLINE=1\)"),
        (client, dict(local_files_only=True), r"was not contacted \(local_files_only=True\)"),
    ):
        who.fails(OfflineError, f"not in the cache '{tmp_path}.*{why}", "locate", name, cache_dir=tmp_path, **options)
    assert hub.seen == []


@pytest.mark.skipif(not PATIENT, reason="this version of huggingface_hub does not try again")
def test_a_hub_that_is_busy_for_a_moment(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add("a/b", files_of(small))
    hub.play(CONFIG, "busy", "busy")
    assert client("load", "a/b", cache_dir=tmp_path).value


@pytest.mark.slow
def test_a_hub_that_stays_busy(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add("a/b", files_of(small))
    hub.play(CONFIG, "busy", "...")
    client.fails(OfflineError, r"download of 'a/b' failed \(HTTP 503\); try again", "load", "a/b", cache_dir=tmp_path)


def test_xet_that_fails() -> None:
    """The hub of the tests has no xet; hf_xet raises RuntimeError with the message of its server."""
    error = explain(RuntimeError(f"CAS service error: https://host/x?Signature={SECRET}"), "a/b", HubOptions())
    assert type(error) is OfflineError
    assert str(error).startswith("download of 'a/b' failed (") and str(error).endswith("set HF_HUB_DISABLE_XET=1")
    assert SECRET not in str(error)


def blob_of(hub: Hub, small: Path) -> str:
    """The path of the weights on the host that stores them."""
    from hub_server import digest

    return f"/elsewhere/{digest((small / 'model.safetensors').read_bytes())}"


@pytest.mark.skipif(not PATIENT, reason="this version of huggingface_hub does not try again")
def test_a_download_that_is_cut_off_is_tried_again(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add("a/b", files_of(small))
    hub.play(blob_of(hub, small), "cut")
    assert client("load", "a/b", cache_dir=tmp_path).value
    ranges = [headers.get("range") for _, path, headers in hub.seen if path == blob_of(hub, small)]
    assert len(ranges) == 2 and ranges[0] is None


@pytest.mark.parametrize("trouble", ["html instead", "empty", "pointer", "garbled"])
def test_something_else_instead_of_the_weights_is_not_kept(
    trouble: str, tmp_path: Path, small: Path, hub: Hub, client: Client
) -> None:
    hub.add("a/b", files_of(small))
    hub.play(blob_of(hub, small), trouble, "...")
    words = r"download of 'a/b' failed \(a file arrived incomplete\); try again"
    client.fails(OfflineError, words, "load", "a/b", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))
    hub.troubles.clear()
    tries = 1 if PATIENT else 2  # old versions go on after the end of that, and find at the end that it was wrong
    assert any(client("load", "a/b", cache_dir=tmp_path).value for _ in range(tries))


def test_a_signed_link_of_the_hub_that_has_expired(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add("a/b", files_of(small))
    hub.play(blob_of(hub, small), "expired", "...")
    client.fails(GatedModelError, r"refused access to 'a/b' \(HTTP 403\)", "load", "a/b", cache_dir=tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a folder that cannot be written")
def test_a_cache_that_cannot_be_written(tmp_path: Path, small: Path, hub: Hub, client: Client) -> None:
    hub.add("a/b", files_of(small))
    (tmp_path / "file").write_text("")
    words = r"download of 'a/b' failed \((Not a directory|File exists)\)"
    client.fails(OfflineError, words, "load", "a/b", cache_dir=tmp_path / "file")
