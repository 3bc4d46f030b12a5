"""Runs dinov3_infer in a separate process, with the environment of a test and the real hub client.

After every call the errors and the debug logs of all libraries are searched for secrets.
"""

import atexit
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hub_server import SECRET, Hub

import dinov3_infer

ADDRESS = r"0x[0-9a-f]{6,}"


@dataclass
class Outcome:
    """The result or the error of a call, the log of the package, and the time in seconds."""

    value: Any
    error: type[Exception] | None
    text: str
    said: list[str]
    seconds: float


class Client:
    """Runs calls one after the other."""

    def __init__(self, **environment: str) -> None:
        self.home = tempfile.TemporaryDirectory()
        clean = {k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING_FACE|TRANSFORMERS_OFFLINE", k)}
        here = {"HF_HOME": self.home.name, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        here["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=clean | here | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.home.name,
        )
        atexit.register(self.close)

    def __call__(self, action: str, *arguments: Any, **options: Any) -> Outcome:
        assert self.process.stdin is not None and self.process.stdout is not None
        plain = [os.fspath(a) if isinstance(a, os.PathLike) else a for a in arguments]
        request = dict(action=action, arguments=plain, options={k: _plain(v) for k, v in options.items()})
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        error = None if answer["error"] is None else getattr(dinov3_infer, answer["error"], None)
        assert answer["error"] is None or error is not None, answer["trace"]  # not one of ours
        assert SECRET not in answer["text"] + answer["trace"], "an error tells a secret"
        assert SECRET not in answer["log"], f"a log tells a secret: {_around(answer['log'])}"
        assert not re.search(ADDRESS, answer["text"] + "".join(answer["said"]))
        assert "\n" not in answer["text"] and not answer["text"].endswith("."), "one sentence"
        return Outcome(answer["value"], error, answer["text"], answer["said"], answer["seconds"])

    def fails(self, kind: type[Exception], words: str, action: str, *arguments: Any, **options: Any) -> Outcome:
        """Makes a call that must fail with this error."""
        outcome = self(action, *arguments, **options)
        assert outcome.error is kind, f"{outcome.error}: {outcome.text}, value {outcome.value}"
        assert re.search(words, outcome.text), outcome.text
        return outcome

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.home.cleanup()


# All tests share these clients, since starting one takes seconds.
_hub, _client = cache(Hub), cache(Client)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub."""
    server = _hub()
    server.reset()
    yield server
    assert server.faults == []


@pytest.fixture
def client(hub: Hub) -> Client:
    return _client(HF_ENDPOINT=hub.url)


@pytest.fixture
def offline(hub: Hub) -> Client:
    """A client with HF_HUB_OFFLINE=1."""
    return _client(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")


@pytest.fixture
def cut_off() -> Client:
    """A client without a network: every connection is refused."""
    return _client(HF_ENDPOINT="http://127.0.0.1:9")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose architecture has no name."""
    config = dinov3_infer.ViTConfig(64, 2, 1, 128)
    return dinov3_infer.Backbone.from_config(config, seed=1).save_pretrained(tmp_path_factory.mktemp("small"))


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _around(log: str) -> str:
    return next(line for line in log.splitlines() if SECRET in line)


def load(name: str, **options: Any) -> str:
    from dinov3_infer import Backbone

    return Backbone.from_pretrained(name, **options).fingerprint()


def locate(name: str, **options: Any) -> list[str | None]:
    from dinov3_infer.hub.locate import HubOptions, locate

    path, info = locate(name, HubOptions(**options))
    return [str(path), info.name if info else None]


def push(source: str, repo_id: str, **options: Any) -> str:
    from dinov3_infer import Backbone

    return Backbone.from_pretrained(source).push_to_hub(repo_id, **options)


def refresh(name: str, cache_dir: str) -> str:
    """`hf download`."""
    from huggingface_hub import snapshot_download

    from dinov3_infer.web import queries_cut

    with queries_cut():  # as the package does: the client's own log contains signed links
        return snapshot_download(name, cache_dir=cache_dir)


def mapped(path: str, **options: Any) -> bool:
    """Whether a model loaded from a file keeps it mapped."""
    from dinov3_infer import Backbone

    model = Backbone.from_pretrained(path, **options)
    return model.training is False and path in Path("/proc/self/maps").read_text()


ACTIONS = dict(load=load, locate=locate, push=push, refresh=refresh, mapped=mapped)


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")
        if record.name == "dinov3_infer" and record.levelno >= logging.WARNING:
            self.said.append(record.getMessage())


def serve() -> None:
    """Reads calls as lines of JSON, and answers each with a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that only answers go to stdout
    listener = Listener()
    logging.root.addHandler(listener)
    logging.root.setLevel(logging.DEBUG)
    importlib.import_module("dinov3_infer.backbone")  # it takes seconds, which would count as part of the first call
    importlib.import_module("huggingface_hub.file_download")
    for line in sys.stdin:
        request = json.loads(line)
        listener.lines, listener.said = [], []
        answer: dict[str, Any] = dict(value=None, error=None, text="", trace="")
        printed = io.StringIO()
        begin = time.perf_counter()
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                answer["value"] = ACTIONS[request["action"]](*request["arguments"], **request["options"])
        except Exception as error:
            answer |= dict(error=type(error).__name__, text=str(error), trace=traceback.format_exc())
        log = "\n".join(listener.lines) + printed.getvalue()
        answer |= dict(seconds=time.perf_counter() - begin, log=log, said=listener.said)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
