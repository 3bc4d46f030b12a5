"""The Python and shell blocks of Markdown pages, and a process that runs them.

The blocks of a page run in order, in one folder and one namespace, as a reader would run them.  A comment on the line
before a block changes that: `<!-- not run: reason -->` leaves it out, `<!-- slow: reason -->` leaves it to the slow
tests, and `<!-- slow: needs PACKAGE -->` to those where PACKAGE is installed.  Names that need a download or a login
are replaced: models by nano, hub ids and links by those of a hub on this machine, released heads by random ones.
Training and benchmarks run with fewer steps.
"""

import contextlib
import glob
import io
import json
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hub_server import WRITER, Hub
from PIL import Image
from repository import EXAMPLES, ROOT

from dinov3_infer import MODELS, Backbone

PAGES = [path for pattern in ("README.md", "examples/**/*.md", ".github/*.md") for path in sorted(ROOT.glob(pattern))]
FENCE = re.compile(r"^(?P<mark><!--.*-->\n)?(?P<indent> *)```(?P<language>.*)\n(?P<code>[\s\S]*?)^ *```$", re.MULTILINE)
MARK = re.compile(r"<!-- (?P<kind>not run|slow): (?P<reason>.+) -->\n")
RUN = {"python", "bash"}  # languages; others are shown only

# --- pages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    where: str  # page:line
    language: str
    code: str
    kind: str = "run"  # or "slow", "not run"
    reason: str = ""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All blocks of a page.  Raises: ValueError for a block without a language, or a comment that means nothing."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        where = f"{name_of(page)}:{text.count(chr(10), 0, fence.start('code'))}"
        if not fence["language"]:
            raise ValueError(f"{where}: a block without a language; write ```python, ```bash or ```text")
        mark = MARK.fullmatch(fence["mark"] or "")
        if mark is None and re.match(r"<!-- *(not|slow)", fence["mark"] or ""):
            raise ValueError(f"{where}: {fence['mark'].strip()} has no reason; write <!-- not run: reason -->")
        code = "\n" * text.count("\n", 0, fence.start("code")) + fence["code"]  # lines as on the page
        found.append(Block(where, fence["language"], code, *((mark["kind"], mark["reason"]) if mark else ())))
    return found


# --- what stands in for downloads, and for hours ---------------------------------------------------------------------

_SHORT = {"steps": 2, "batch_size": 2, "global_px": 32, "local_px": 16, "num_local": 1, "dino_prototypes": 16,
          "ibot_prototypes": 16, "head_hidden": 16, "head_bottleneck": 8, "spread_group": 2, "workers": 0}  # fmt: skip
# command -> options that come after those of the page
_SMALLER = {
    "train": [part for name, value in _SHORT.items() for part in (f"--{name.replace('_', '-')}", str(value))],
    "bench": ["--rounds", "1", "--size", "32", "--batch", "1", "--threads", "1"],
}
_NAMES = sorted({short for name in MODELS for short in (name, name.removeprefix("dinov3_"))} - {"nano"}, key=len)
_TINY = MODELS["eupe_vitt16"]  # the smallest that timm has a name for
_IDS = {id: home for row in MODELS.values()
        for id, home in ((row.hub_id, "someone/nano"), (row.timm_id, _TINY.timm_id)) if id}  # fmt: skip


def replaced(code: str, hub: str) -> str:
    """A block with names that can be had here; `hub`: the address of the stand-in."""
    for id in sorted(_IDS, key=len, reverse=True):
        code = code.replace(id, str(_IDS[id]))
    code = re.sub(r"\bdinov3_\w+_pretrain_\w+-[0-9a-f]{8}\.pth", "nano-meta.pth", code)
    code = re.sub(r"https://(?:host|example\.org)(?=/)", hub, code)
    code = re.sub(rf"(?<![\w/.-])(?:{'|'.join(reversed(_NAMES))})(?![\w/.-])", "nano", code)
    return re.sub(r"\bsteps=\d+", ", ".join(f"{name}={value}" for name, value in _SHORT.items()), code)


def world(folder: Path, text: str) -> None:
    """The files that a page names."""
    photos = [Image.open(EXAMPLES / "cat.jpg")]
    photos += [Image.open(ROOT / "dinov3_infer" / "data" / "samples" / f"{name}.png") for name in ("coffee", "rocket")]
    photos = [photo.convert("RGB").resize((451, 300)) for photo in photos]
    for i, name in enumerate(sorted(set(re.findall(r"[\w/]+\.jpg", text)))):
        if "/" not in name and name != "missing.jpg":
            photos[i % 3].save(folder / name, quality=95)
    (folder / "photos").mkdir()
    for i, photo in enumerate(photos):
        photo.save(folder / "photos" / f"{i}.jpg", quality=95)
    for name in set(re.findall(r"photos/(\w+)/", text)):  # a class
        (folder / "photos" / name).mkdir()
        for i in range(2):
            photos[i].save(folder / "photos" / name / f"{name}{i}.png")
    (folder / "list.txt").write_text("photos/0.jpg\n")
    (folder / "names.txt").write_text("cat\ntench, Tinca tinca\n")
    if "clip.gif" in text:
        photos[0].save(folder / "clip.gif", save_all=True, append_images=photos[1:2])
    if "shards/" in text:
        (folder / "shards").mkdir()
        with tarfile.open(folder / "shards" / "0.tar", "w") as archive:
            archive.add(folder / "photos" / "1.jpg", "1.jpg")
    if "more.parquet" in text:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"image": [(folder / "photos" / "2.jpg").read_bytes()]}), folder / "more.parquet")
    nano = Backbone.from_pretrained("nano", device="cpu")
    meta = nano.save_pretrained(folder / "nano-meta.pth", layout="meta")
    for name in ("weights.pth", "model.safetensors", "state_dict.pth"):
        if name in text:
            nano.save_pretrained(folder / name, layout="meta")
    if "teacher_checkpoint.pth" in text:
        (folder / "run/eval/training_9999").mkdir(parents=True)
        teacher = {f"backbone.{name}": tensor for name, tensor in torch.load(meta, weights_only=True).items()}
        torch.save({"teacher": teacher}, folder / "run/eval/training_9999/teacher_checkpoint.pth")
    (folder / "examples").symlink_to(EXAMPLES)


def fill(hub: Hub) -> None:
    """What the stand-in of the hub has."""
    nano, tiny = Backbone.from_pretrained("nano", device="cpu"), Backbone.from_config(_TINY.name, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        saved = {"someone/nano": nano.save_pretrained(Path(scratch) / "hf")}
        saved[str(_TINY.timm_id)] = tiny.save_pretrained(Path(scratch) / "timm", layout="timm")
        for name, path in saved.items():
            files = [file for file in path.rglob("*") if file.is_file()]
            hub.add(name, {file.relative_to(path).as_posix(): file.read_bytes() for file in files})
        hub.files["/nano-meta.pth"] = nano.save_pretrained(Path(scratch) / "nano.pth", layout="meta").read_bytes()
    hub.files["/b.jpg"] = (EXAMPLES / "cat.jpg").read_bytes()


# --- the process -----------------------------------------------------------------------------------------------------


class Reader:
    """Runs pages in a process that knows this machine's hub alone."""

    def __init__(self) -> None:
        self.hub, self.home = Hub(), tempfile.TemporaryDirectory()
        fill(self.hub)
        self.start()

    def start(self) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": self.home.name, "HF_TOKEN": WRITER, "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=clean | own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=self.home.name,
        )  # fmt: skip

    def read(self, folder: Path, wanted: list[Block]) -> str | None:
        """Runs blocks in a folder; what was wrong, with the place on its page, or None."""
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = [asdict(block) | {"code": replaced(block.code, self.hub.elsewhere)} for block in wanted]
        self.process.stdin.write(json.dumps({"folder": str(folder), "blocks": asked}) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            status = self.process.wait(timeout=20)
            self.start()  # for the next page
            return f"{wanted[0].where}: the process that runs the page ended with {status}; stderr says why"
        return json.loads(answer)["wrong"]  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()  # it holds nothing that has to be written
        self.process.wait(timeout=20)
        self.home.cleanup()


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, patterns not expanded."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split, words.commenters = True, "#"
        command: list[str] = []
        for word in [*words, ";"]:
            if word in (";", "&&"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def shell(command: list[str]) -> None:
    """Raises: RuntimeError for a command that is not known here or ends with another status than 0."""
    program, *words = command
    argv = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else []) or [word]]
    status: Any = 0
    if program == "dinov3-infer":
        from dinov3_infer.cli import main

        status = main([*argv, *_SMALLER.get(argv[0], [])])
    elif program == "python" and argv[0].endswith(".py"):
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            del sys.path[0]
    elif program == "pip" and argv[0] == "install":  # not run; its extras have to exist
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = {extra for word in argv for extra in re.findall(r"\[(.*)\]", word) for extra in extra.split(",")}
        status = f"no extra {asked - set(extras)}" if asked - set(extras) else 0
    else:
        raise RuntimeError(f"{program} is not known to tests/support/snippets.py; add <!-- not run: reason -->")
    if status != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {status}")


def run(block: dict[str, str], namespace: dict[str, Any]) -> None:
    if block["language"] == "python":
        exec(compile(block["code"], block["where"].rpartition(":")[0], "exec"), namespace)
    else:
        for command in commands(block["code"]):
            shell(command)


def serve() -> None:
    """Reads pages as lines of JSON and answers each with what was wrong."""
    from texts import SMALL, small_heads

    from dinov3_infer.released import attach
    from dinov3_infer.released.catalogue import find_head

    def random_head(name: str, *_: Any, variant: Any = None, **__: Any) -> Any:
        if find_head(name).kind != "text":
            return attach.random_head(name, variant)
        with small_heads():  # those of text have 860 million parameters with their backbone
            return attach.random_head(SMALL)

    attach.load_head = random_head
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else gets between the answers
    for line in sys.stdin:
        page, wrong = json.loads(line), None
        os.chdir(page["folder"])
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in page["blocks"]:
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    run(block, namespace)
            except BaseException:  # of whatever kind, it belongs to the page
                wrong = (
                    f"{block['where']}\n{block['code'].strip()}\n\n{said.getvalue()[-3000:]}\n{traceback.format_exc()}"
                )
                break
        print(json.dumps({"wrong": wrong}), file=answers, flush=True)


if __name__ == "__main__":
    logging.captureWarnings(True)
    serve()
