"""Weights behind a link are downloaded once and whole, or refused with an error that shows no signature."""

import base64
import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hub_client import Client, client as client, cut_off as cut_off, hub as hub, small as small
from hub_server import PAGE, SECRET, Hub

from dinov3_infer import Backbone, CheckpointError, GatedModelError, InputError, ModelNotFoundError, OfflineError
from dinov3_infer.hub.download import _expiry
from dinov3_infer.web import is_link, queries_cut, without_query

VITS = "dinov3_vits16_pretrain_lvd1689m-08c60483"


@pytest.fixture(scope="session")
def meta_files(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model as one file of each kind."""
    folder, model = tmp_path_factory.mktemp("meta"), Backbone.from_pretrained(small)
    kinds = (".pth", ".safetensors")
    return {kind: model.save_pretrained(folder / f"m{kind}", layout="meta").read_bytes() for kind in kinds}


def kept(folder: Path) -> list[Path]:
    """Files in a cache, without locks."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_downloaded_once(kind: str, meta_files: dict, tmp_path: Path, hub: Hub, client: Client) -> None:
    """A newly signed link finds an earlier download, and nothing of the signature is stored."""
    link = hub.link(f"/models/my model{kind}", meta_files[kind], f"Expires=1&Signature={SECRET}").replace(" ", "%20")
    first = client("load", f"  {link}\n", cache_dir=tmp_path).value
    assert first and len(hub.seen) == 1
    (path,) = kept(tmp_path)
    assert path.name == f"my model{kind}" and path.read_bytes() == meta_files[kind]
    assert path.parts[len(tmp_path.parts) :][:2] == ("dinov3_infer", "links")
    again = client("load", link.replace("Expires=1", "Expires=2"), cache_dir=tmp_path)
    assert again.value == first and len(hub.seen) == 1
    assert SECRET.encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_link_as_the_weights_of_a_name(tmp_path: Path, hub: Hub, client: Client) -> None:
    model = Backbone.from_config("nano", seed=1)
    content = model.save_pretrained(tmp_path / "nano.pth", layout="meta").read_bytes()
    link = hub.link("/nano.pth", content, f"Signature={SECRET}")
    assert client("load", "nano", weights=link, cache_dir=tmp_path / "cache").value == model.fingerprint()
    words = "asked for dinov3_vitb16"
    client.fails(CheckpointError, words, "load", "vitb16", weights=link, cache_dir=tmp_path / "cache")
    assert len(hub.seen) == 1


def test_files_of_one_name_are_told_apart(meta_files: dict, tmp_path: Path, hub: Hub, client: Client) -> None:
    """Files of one name at two hosts stay apart, and a stored hub token goes to no other host."""
    links = [hub.link(f"/{who}/model.pth", meta_files[".pth"]) for who in "ab"]
    paths = {client("locate", link, cache_dir=tmp_path, token=f"hf_{SECRET}").value[0] for link in links}
    assert len(paths) == 2
    assert all("authorization" not in headers for _, _, headers in hub.seen)


def test_a_typo_in_the_name_is_found_before_anything_is_downloaded(tmp_path: Path, hub: Hub, client: Client) -> None:
    link = hub.link("/model.pth", b"")
    client.fails(ModelNotFoundError, "did you mean", "load", "vits-16", weights=link, cache_dir=tmp_path)
    assert hub.seen == []


def test_metas_file_says_its_licence_and_has_to_be_it(
    meta_files: dict, tmp_path: Path, hub: Hub, client: Client
) -> None:
    """The digest in a name must match the file; a file without one is accepted."""
    link = hub.link(f"/{VITS}.pth", meta_files[".pth"], f"Signature={SECRET}")
    found = hashlib.sha256(meta_files[".pth"]).hexdigest()[:8]
    words = rf"'{hub.elsewhere}/{VITS}.pth' is not the file of that name: its SHA-256 begins with {found}; download"
    client.fails(CheckpointError, words, "locate", link, cache_dir=tmp_path)
    assert kept(tmp_path) == []
    known = hub.link("/dinov2_vits14_pretrain.pth", meta_files[".pth"], f"Signature={SECRET}")
    outcome = client("locate", known, cache_dir=tmp_path)
    plain = f"{hub.elsewhere}/dinov2_vits14_pretrain.pth"
    assert outcome.said == [f"dinov2_vits14: downloaded from '{plain}'; the licence of these weights: Apache-2.0"]
    assert client("locate", known, cache_dir=tmp_path).said == []
    words = "has the name of dinov2_vits14's file; give that name"
    client.fails(CheckpointError, words, "load", "vitb16", weights=known, cache_dir=tmp_path)


REFUSED = {  # behaviour of the server; query of the link; error
    "expired": (
        "expired", f"Expires=1500000000&Signature={SECRET}&Key-Pair-Id=K", GatedModelError,
        r"download of '{plain}' was refused \(HTTP 403\); the link expired on 2017-07-14 at 02:40 UTC, so ask for",
    ),
    "refused, who knows why": (
        "expired", f"Signature={SECRET}", GatedModelError,
        r"was refused \(HTTP 403\); signed links expire, so ask for a new one, and give the whole link in quotes$",
    ),
    "refused, not signed": ("expired", "", GatedModelError, "log in with a browser, .* and give its path$"),
    "nothing there": ("gone", f"Signature={SECRET}", ModelNotFoundError, r"nothing at '{plain}' \(HTTP 404\); check"),
    "busy": ("busy", f"Signature={SECRET}", OfflineError, r"download of '{plain}' failed \(HTTP 503\); try again, or"),
    "a page": (
        "html", f"Signature={SECRET}", CheckpointError,
        "'{plain}' leads to a web page, not to a weights file; open it in a browser, log in if asked, download",
    ),
    "to a login page elsewhere": ("to a login page", "", CheckpointError, "'{plain}' leads to a web page"),
    "a page that says nothing of it": (
        "untyped page", f"Signature={SECRET}", CheckpointError,
        "'{plain}' is not a checkpoint: it starts with '<!DOC', as an error page does .*; download it again",
    ),
    "a pointer of Git LFS": ("pointer", "", CheckpointError, "'{plain}' is not a checkpoint: it is a Git LFS pointer"),
    "empty": ("empty", "", CheckpointError, "'{plain}' is not a checkpoint: it is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_link_can_lead_to(case: str, meta_files: dict, tmp_path: Path, hub: Hub, client: Client) -> None:
    """Refused content does not enter the cache, so the next try can succeed."""
    trouble, query, kind, words = REFUSED[case]
    link = hub.link("/m.pth", meta_files[".pth"], query)
    hub.files["/login"] = PAGE
    hub.play("/m.pth", trouble, "...")
    hub.play("/login", "html", "...")
    words = words.replace("{plain}", f"{hub.elsewhere}/m.pth")
    outcome = client.fails(kind, words, "load", link, cache_dir=tmp_path)
    assert outcome.seconds < 2 and kept(tmp_path) == []
    hub.troubles.clear()
    assert client("load", link, cache_dir=tmp_path).value


def test_a_connection_that_ends_early_is_taken_up_again(
    meta_files: dict, tmp_path: Path, hub: Hub, client: Client
) -> None:
    content = meta_files[".pth"]
    link = hub.link("/m.pth", content, f"Signature={SECRET}")
    hub.play("/m.pth", "cut")
    path = Path(client("locate", link, cache_dir=tmp_path).value[0])
    assert path.read_bytes() == content
    (first, second) = (headers for _, _, headers in hub.seen)
    assert "range" not in first and second["if-range"] == f'"{hashlib.sha256(content).hexdigest()}"'
    assert 0 < int(second["range"].removeprefix("bytes=").rstrip("-")) <= len(content) // 2


def test_a_file_that_changes_meanwhile_is_begun_again(
    meta_files: dict, tmp_path: Path, hub: Hub, client: Client
) -> None:
    link = hub.link("/m.pth", b"\0" * len(meta_files[".pth"]))
    hub.play("/m.pth", "cut")
    hub.after["/m.pth"] = lambda: hub.files.update({"/m.pth": meta_files[".pth"]})
    path = Path(client("locate", link, cache_dir=tmp_path).value[0])
    assert path.read_bytes() == meta_files[".pth"]


def test_of_several_processes_one_downloads(
    meta_files: dict, tmp_path: Path, hub: Hub, client: Client, cut_off: Client
) -> None:
    link = hub.link("/m.pth", meta_files[".pth"])
    hub.play("/m.pth", "slow", "...")
    assert client("locate", tmp_path).value and cut_off("locate", tmp_path).value  # both are up
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda who: who("locate", link, cache_dir=tmp_path).value[0], (client, cut_off))
    assert first == second and len(hub.seen) == 1


@pytest.mark.slow
def test_a_connection_that_always_ends_early(tmp_path: Path, hub: Hub, client: Client) -> None:
    link = hub.link("/m.pth", b"12345678")
    hub.play("/m.pth", "cut", "...")
    words = r"download of '.*/m.pth' stopped at 7 of 8 bytes \(.*\); try again$"
    client.fails(OfflineError, words, "locate", link, cache_dir=tmp_path)
    assert kept(tmp_path) == []


def test_without_a_network(tmp_path: Path, cut_off: Client) -> None:
    link = f"http://127.0.0.1:9/m.pth?Signature={SECRET}"
    words = r"download of 'http://127.0.0.1:9/m.pth' failed \(Connect\w+\); try again, or give the path"
    assert cut_off.fails(OfflineError, words, "load", link, cache_dir=tmp_path).seconds < 2
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "link, words",
    [
        ("s3://bucket/m.pth", r"'s3://\.\.\.' is no http or https link"),
        (f"http:///m.pth?Signature={SECRET}", "no http or https link"),
        ("http://[::1/m.pth", "no http or https link"),
        (
            f"http://host/page?file=m.pth&Signature={SECRET}",
            r"a weights file \(.safetensors, .pth.*, and 'http://host/page",
        ),
        (f"https://me:{SECRET}@host/", "and 'https://host/' does not; download the file, and give its path"),
        (f"https://host/my model.pth?Signature={SECRET}", "'https://...' is no http or https link"),
        (f"https:/host/m.pth?Signature={SECRET}", "'https://...' is no http or https link"),
        (
            f"host/models/m.pth?Signature={SECRET}",
            r"'host/models/m.pth\?...' is no path and no name; give a link that begins with h",
        ),
    ],
    ids=["scheme", "no host", "broken host", "no file", "password", "white space", "made a path", "no scheme"],
)
def test_what_is_no_link_to_weights(link: str, words: str, tmp_path: Path, client: Client) -> None:
    client.fails(InputError, words, "load", link, cache_dir=tmp_path)
    client.fails(InputError, words, "load", "vits16", weights=link, cache_dir=tmp_path)


def test_a_host_that_cannot_be(tmp_path: Path, client: Client) -> None:
    words = r"download of 'http://a..b/m.pth' failed \(the address is not valid\); try again"
    client.fails(OfflineError, words, "load", f"http://a..b/m.pth?Signature={SECRET}", cache_dir=tmp_path)


def test_is_link() -> None:
    assert all(map(is_link, ("https://host/m.pth", "S3://bucket/m.pth", " http://host", Path("http://host/m.pth"))))
    assert not any(map(is_link, ("vits16", "org/name", r"C:\models\m.pth", "C:/models", "./m.pth", Path("m.pth"))))


@pytest.mark.parametrize(
    "link, plain",
    [
        ("https://host/a/b.pth?Policy=x#part", "https://host/a/b.pth"),
        ("HTTP://me:word@Host:8080/b.pth", "http://host:8080/b.pth"),
        ("https://[2001:db8::1]:443/b.pth?x", "https://[2001:db8::1]:443/b.pth"),
        (" https://host/b.pth?x\n", "https://host/b.pth"),
    ],
)
def test_without_query(link: str, plain: str) -> None:
    assert without_query(link) == plain


def test_when_a_link_expires() -> None:
    policy = '{"Statement":[{"Resource":"https://host/*","Condition":{"DateLessThan":{"AWS:EpochTime":1700000000}}}]}'
    cloudfront = base64.b64encode(policy.encode()).decode().translate(str.maketrans("+=/", "-_~"))
    then = datetime.fromtimestamp(1_700_000_000, UTC)
    assert _expiry(f"Policy={cloudfront}&Signature=x") == then
    assert _expiry("Expires=1700000000&Signature=x") == then
    assert _expiry("X-Amz-Date=20231114T221220Z&X-Amz-Expires=60") == then
    for odd in ("", "Policy=%%%", "Policy=e30_", "Expires=soon", "X-Amz-Date=today", "Expires=99999999999999999"):
        assert _expiry(odd) is None


def test_queries_stay_out_of_logs_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("httpx")
    caplog.set_level(logging.INFO)
    with queries_cut(), queries_cut():
        logger.info('HTTP Request: %s %s "%s"', "GET", f"https://host/m.pth?Signature={SECRET}", "200 OK")
    logger.info("after: %s", "https://host/?x")
    assert caplog.messages == ['HTTP Request: GET https://host/m.pth "200 OK"', "after: https://host/?x"]
