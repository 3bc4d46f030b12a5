"""A local hub: the requests of huggingface_hub's client, plain links, and failures on demand."""

import base64
import hashlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SECRET = "s3cr3t"  # part of every token and signature; no message may contain it
WRITER, READER, STRANGER = (f"hf_{who}{SECRET}" for who in ("writer", "reader", "stranger"))
BIG = (".safetensors", ".bin", ".pth")  # large files, which a hub serves from another host


@dataclass
class Repository:
    """Commits by hash, branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode() + branch.encode())
        digest.update(str(len(self.commits)).encode())
        self.commits[digest.hexdigest()] = dict(files)
        self.refs[branch] = digest.hexdigest()
        return digest.hexdigest()

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """Serves until the process ends.  `play` sets the failures of a path, `seen` lists all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"  # a client takes it for another host
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, bytes] = {}  # behind plain links
        self.after: dict[str, Callable[[], object]] = {}  # called after a path was downloaded
        self.blobs: dict[str, bytes] = {}
        self.troubles: dict[str, list[str]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[str] = []

    def add(self, name: str, files: dict[str, bytes], **options: bool) -> Repository:
        repository = self.repositories.setdefault(name, Repository(**options))
        repository.commit(files)
        return repository

    def link(self, path: str, content: bytes, query: str = "") -> str:
        """A link to a file on another host than the hub; a signed one needs its signature."""
        self.files[path] = content
        return f"{self.elsewhere}{path}{'?' if query else ''}{query}"

    def play(self, path: str, *troubles: str) -> None:
        """Sets the answers to the next requests for a path; a final "..." repeats the one before it."""
        self.troubles[path] = list(troubles)

    def asked(self, method: str | None = None) -> list[str]:
        """The requested paths."""
        return [path for verb, path, _ in self.seen if method in (None, verb)]

    def handle_error(self, *_: object) -> None:
        """Ignores a client that hangs up; any other error is a fault of this file."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.faults.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.answer(path, parse_qs(urlsplit(self.path).query), self.body())
        if self.command == "GET" and path in self.server.after:
            self.server.after.pop(path)()

    def answer(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        self.server.seen.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        planned = self.server.troubles.get(path, [])
        trouble = planned[0] if planned else None
        if planned and planned[1:] != ["..."]:
            planned.pop(0)
        if trouble == "slow":
            time.sleep(0.5)
        self.cut = trouble == "cut" and not self.is_head
        if trouble in TROUBLES and not (trouble == "html instead" and self.is_head):
            return TROUBLES[trouble](self, path)
        assert trouble in (None, "cut", "slow", "html instead"), trouble
        if path.startswith("/api/"):
            return self.api(path, body)
        if path.startswith("/elsewhere/"):
            return self.elsewhere(path.rpartition("/")[2], query)
        if "/resolve/" in path:
            return self.resolve(urlsplit(self.path).path)
        return self.plain(path, query)

    do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815

    cut = False

    @property
    def is_head(self) -> bool:
        return self.command == "HEAD"

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        """Sends an answer; header names are given with underscores."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | named).items():
            self.send_header(name, value)
        if self.cut:
            self.send_header("Connection", "close")
        self.end_headers()
        if not self.is_head:
            self.wfile.write(content[: len(content) // 2] if self.cut else content)
        if self.cut:
            self.close_connection = True

    def send_file(self, content: bytes, **headers: str) -> None:
        """Sends the file, or the requested range of it."""
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        start = start if self.headers.get("If-Range") in (None, quoted(content)) else 0
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if start else 200, content[start:], **{"ETag": quoted(content), **headers})

    def fail(self, status: int, code: str | None, text: str, **headers: str) -> None:
        named = {"X_Error_Message": text} | ({"X_Error_Code": code} if code else {}) | headers
        self.send(status, json.dumps({"error": text}).encode(), Content_Type="application/json", **named)

    def admitted(self, name: str) -> Repository | None:
        """The repository, if the client may read it; else answers with the reason, as the hub does."""
        repository = self.server.repositories.get(name)
        token = self.token
        if token not in (None, WRITER, READER, STRANGER):
            self.fail(401, None, "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and token not in (WRITER, READER)):
            if token is None:
                self.fail(401, "RepoNotFound", "Invalid username or password.")
            else:
                self.fail(404, "RepoNotFound", "Repository not found")
        elif repository.gated and token not in (WRITER, READER):
            self.fail(401 if token is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return repository
        return None

    def resolve(self, path: str) -> None:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, file = (unquote(part) for part in rest.split("/", 1))
        repository = self.admitted(name)
        if repository is None:
            return None
        commit = repository.at(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        content = repository.commits[commit].get(file)
        if content is None:
            return self.fail(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        if not file.endswith(BIG):
            return self.send_file(content, X_Repo_Commit=commit)
        self.server.blobs[digest(content)] = content
        where = f"{self.server.elsewhere}/elsewhere/{digest(content)}?X-Amz-Signature={SECRET}"
        linked = dict(X_Linked_Size=str(len(content)), X_Linked_ETag=quoted(content))
        self.send(302, Location=where, X_Repo_Commit=commit, ETag=quoted(content), **linked)

    def elsewhere(self, key: str, query: dict[str, list[str]]) -> None:
        """The host of large files: it needs a signed link, and refuses requests that carry a token."""
        if query.get("X-Amz-Signature") != [SECRET] or self.token is not None:
            return refuse(self, "")
        self.send_file(self.server.blobs[key])

    def plain(self, path: str, query: dict[str, list[str]]) -> None:
        if path not in self.server.files:
            return self.send(404, b"nothing here", Content_Type="text/plain")
        if query.get("Signature", [SECRET]) != [SECRET]:
            return refuse(self, path)
        self.send_file(self.server.files[path], Content_Type="application/octet-stream")

    def api(self, path: str, body: bytes) -> None:
        parts = path.removeprefix("/api/").split("/")
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.command == "POST" and self.token != WRITER:
            return self.fail(401 if self.token is None else 403, None, "You don't have the rights")
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'writer'}/{wanted['name']}"
            if name in self.server.repositories:
                return self.json({"error": "You already created this repo", "url": f"{self.server.url}/{name}"}, 409)
            self.server.add(
                name, {}, private="private" in (wanted.get("visibility"), wanted.get("private") and "private")
            )
            return self.json({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        repository = self.admitted(f"{parts[1]}/{parts[2]}")
        if repository is None:
            return None
        what, branch = parts[3] if len(parts) > 3 else "revision", "/".join(parts[4:]) or "main"
        if what == "branch":
            repository.refs.setdefault(branch, repository.refs["main"])
            return self.json({})
        commit = repository.at(branch)
        if commit is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        files = repository.commits[commit]
        listed = [{"type": "file", "path": n, "size": len(c), "oid": digest(c)} for n, c in files.items()]
        if what == "tree":
            return self.json(listed)
        if what == "revision":
            return self.json({"id": path, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.json({"files": [dict(path=n, uploadMode="regular", shouldIgnore=False) for n in names]})
        assert what == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files = files | {value["path"]: base64.b64decode(value["content"])}
            elif line["key"] == "deletedFile":
                files = {name: content for name, content in files.items() if name != value["path"]}
        made = repository.commit(files, branch)
        link = f"{self.server.url}/{parts[1]}/{parts[2]}/commit/{made}"
        return self.json({"success": True, "commitOid": made, "commitUrl": link})

    def json(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), Content_Type="application/json")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def quoted(content: bytes) -> str:
    return f'"{digest(content)}"'


PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 86400000\n"


def page(handler: Handler, _: str) -> None:
    handler.send(200, PAGE, Content_Type="text/html; charset=utf-8")


def refuse(handler: Handler, _: str) -> None:
    text = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    handler.send(403, text, Content_Type="application/xml")


# the failures that `play` knows
TROUBLES: dict[str, Callable[[Handler, str], None]] = {
    "busy": lambda handler, _: handler.send(503, b"try later"),
    "html": page,
    "html instead": page,  # HEAD is answered as usual
    "garbled": lambda handler, path: handler.send(200, bytes(len(handler.server.blobs[path.rpartition("/")[2]]))),
    "untyped page": lambda handler, _: handler.send(200, PAGE),
    "gone": lambda handler, _: handler.send(404, b"nothing here", Content_Type="text/html"),
    "expired": refuse,
    "forbidden": lambda handler, _: handler.fail(403, None, "enable access to gated repositories in the token"),
    "pointer": lambda handler, _: handler.send(200, POINTER, Content_Type="text/plain"),
    "empty": lambda handler, _: handler.send(200, b""),
    "to a login page": lambda handler, path: handler.send(
        302, Location=f"{handler.server.elsewhere}/login?next={path}&session={SECRET}"
    ),
}
