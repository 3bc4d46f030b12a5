"""The command line: help, usage, errors, exit statuses, streams, interruption."""

import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import Text, refused, run, small_model, write_pictures
from repository import ROOT

import dinov3_infer
from dinov3_infer.cli import models as models_command
from dinov3_infer.cli.main import printable, say
from dinov3_infer.cli.parser import parse
from dinov3_infer.zoo import MODELS

COMMANDS = (
    "embed",
    "features",
    "classify",
    "show",
    "explore",
    "models",
    "convert",
    "doctor",
    "verify",
    "export",
    "bench",
)
KINDS = ("pca", "attention", "similarity")
ON_VECTORS = ("search", "dedup", "curate")


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60, **options
    )  # type: ignore[call-overload]


def test_every_help_comes_at_once_and_without_torch() -> None:
    """Measured as CPU time of the whole process, so that a busy machine has no effect."""
    script = f"""
import sys, time
from dinov3_infer.cli import main
for argv in ([], *([name] for name in {COMMANDS}), *(["show", kind] for kind in {KINDS}),
             *(["embed", kind] for kind in {ON_VECTORS})):
    assert main([*argv, "--help"]) == 0
print({{"torch", "numpy", "PIL", "huggingface_hub", "safetensors"}} & set(sys.modules), time.process_time())
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("set() ") and float(last.removeprefix("set() ")) < 0.3, last
    for name in (*COMMANDS, "train", *KINDS, *ON_VECTORS, "exit status", "@LIST"):
        assert name in done.stdout


def test_the_commands_of_the_readme_are_valid() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition(" #")[0] for block in blocks for line in re.split(r"[\n;]|&&", block)]
    commands = [shlex.split(line)[1:] for line in lines if line.strip().startswith("dinov3-infer ")]
    assert {argv[0] for argv in commands} == {*COMMANDS, "train"}, "every command has its line"
    for argv in commands:
        if argv[0] != "train":  # whose options are the trainer's
            parse(argv)


def test_as_a_module_and_its_version() -> None:
    done = python("-m", "dinov3_infer", "--version")
    assert (done.returncode, done.stdout) == (0, f"dinov3-infer {dinov3_infer.__version__}\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["pca"], "invalid choice: 'pca'"),
        (["embed", "a.jpg"], "required: -o"),
        (["embed", "-o", "x.npy"], "required: SRC"),
        (["embed", "a.jpg", "-o", "x.npy", "--size", "12.5"], "SIDE or HEIGHTxWIDTH in pixels, or own; got '12.5'"),
        (["embed", "a.jpg", "-o", "x.npy", "--batch-size", "0"], "whole number of at least 1; got '0'"),
        (["embed", "a.jpg", "-o", "x.npy", "--fit", "stretch"], "invalid choice: 'stretch'"),
        (["embed", "a.jpg", "-o", "x.npy", "--pool", "mean"], "no option .--pool.; did you mean .--pooling"),
        (["features", "a.jpg", "-o", "x", "--layers", "1;2"], "numbers with commas between them, as in -1,-4"),
        (["show", "similarity", "a.jpg", "-o", "x.png"], "required: --point"),
        (["show", "attention", "a.jpg", "-o", "x.png", "--point", "5"], "X,Y in pixels from the upper left corner"),
        (["convert", "a", "b"], "required: --to"),
        (["embed", "a.jpg", "-o", "x.npy", "-j", "-3"], "whole number of at least 0; got '-3'"),
        (["embed", "-weird.jpg", "-o", "x.npy"], "required: SRC"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(argv: list[str], words: str) -> None:
    refused(2, words, *argv)


def test_values_that_begin_with_a_minus(tmp_path: Path) -> None:
    source = write_pictures(tmp_path, "a.png") / "a.png"
    for option in ("--layers", "--layers=-1,-4"):
        values = ["-1,-4"] if option == "--layers" else []
        out = tmp_path / f"out{len(values)}"
        ran = run("features", source, "-o", out, "-m", small_model(), option, *values, "--size", "32")
        assert ran.status == 0 and (out / "a.safetensors").is_file(), ran
    refused(1, "outside the image", "show", "attention", source, "-o", tmp_path / "a.jpg", "-m", small_model(),
            "--point", "-1,-4")  # fmt: skip


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (dinov3_infer.InputError("a is b; give c"), r"error: a is b; give c$"),
        (dinov3_infer.InputError("give a smaller size=, or fit='squash'"), "give a smaller --size, or --fit squash$"),
        (
            dinov3_infer.InputError("see list_models(), or give weights=PATH"),
            "see 'dinov3-infer models', or give the path of a file$",
        ),
        (dinov3_infer.InputError("'size=3/a' exists; give another name, or overwrite it"), "'size=3/a'.* or --over"),
        (
            OSError(28, "No space left on device", "x\ny.npy"),
            r"error: 'x\\ny.npy' could not be written .No space left on device.: the disk is full",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "the device ran out of memory"),
        (KeyError("secret"), "unexpected KeyError, a bug in dinov3-infer.*--debug.*doctor"),
    ],
    ids=["ours", "options", "models", "a path", "system", "memory", "fault"],
)
def test_an_error_is_one_line(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(models_command, "run", fail)
    refused(1, words, "models")
    ran = run("models", "--debug")
    assert ran.status == 1 and "Traceback" in ran.err and "in fail" in ran.err


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(models_command, "run", interrupt)
    ran = run("models")
    assert (ran.status, ran.out, ran.err) == (130, "", "dinov3-infer: interrupted\n")


# a process of its own, with a command that costs nothing
PROCESS = """
import sys, time, types
from dinov3_infer.cli.main import main, say
command = types.ModuleType("command")
def run(_):
    say("ready")
    if sys.argv[1] == "wait":
        sys.stdout.flush()
        time.sleep(60)
    return 0
command.run = run
sys.modules["dinov3_infer.cli.models"] = command
sys.exit(main(["models"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of Unix")
@pytest.mark.parametrize("what", ["interrupted", "closed pipe"])
def test_a_real_interruption_and_a_closed_pipe(what: str) -> None:
    """As from a shell: the status is 130, and `dinov3-infer models | head` ends without a message."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, "wait" if what == "interrupted" else ""],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    if what == "interrupted":
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        expected = (130, "dinov3-infer: interrupted\n")
    else:
        process.stdout.close()
        expected = (0, "")
    assert (process.wait(timeout=60), process.stderr.read()) == expected


def test_the_log_is_left_as_it_was() -> None:
    log = logging.getLogger("dinov3_infer")
    before = (log.level, list(log.handlers))
    run("models", "--debug")
    assert (log.level, list(log.handlers)) == before


def test_a_bar_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "in", "a.png", "b.png")
    for command, out in (("embed", "x.npy"), ("features", "maps")):
        flags = ("-o", tmp_path / out, "-m", small_model(), "--size", "32", "--overwrite")
        assert run(command, tmp_path / "in", *flags).err.count("\n") == 1
        with monkeypatch.context() as patch:
            patch.setattr(Text, "isatty", lambda _: True)
            shown = run(command, tmp_path / "in", *flags, "--debug")
        assert "2/2" in shown.err and "img" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [("Käse 日本", "Käse 日本"), ("a\nb\x1b[31m", r"a\nb\x1b[31m"), ("caf\udce9", r"caf\udce9")],
    ids=["letters", "control", "not UTF-8"],
)
def test_what_is_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_terminal_that_lacks_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", narrow)
    say("Käse 日本")
    assert narrow.buffer.getvalue() == b"K\xe4se \\u65e5\\u672c" + os.linesep.encode()  # type: ignore[attr-defined]


def test_train_has_options_of_its_own() -> None:
    ran = run("train", "--help")
    assert ran.status == 0 and "--dry-run" in ran.out and "usage: dinov3-infer train" in ran.out
    assert run("train", "--no-such-option").status == 2


def test_quiet_says_nothing_but_errors_and_verbose_says_what_is_done(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.png", "broken.png")
    rest = ("-m", small_model(), "--device", "cpu", "--size", "32")
    verbose = run("embed", tmp_path / "in", "-o", tmp_path / "v.npy", *rest, "-v").err.splitlines()
    assert any(line.startswith(f"dinov3-infer: loaded '{small_model()}' on cpu: nano, layout ") for line in verbose)
    assert "wrote" in verbose[-1] and "1 could not be read" in verbose[-1]
    for flag in ("-q", "--quiet"):
        ran = run("embed", tmp_path / "in", "-o", tmp_path / "q.npy", "--overwrite", *rest, flag)
        assert (ran.status, ran.err) == (3, "")
    refused(1, "no image, folder or pattern at", "embed", tmp_path / "none.png", "-o", tmp_path / "x.npy", *rest, "-q")


# --- models --------------------------------------------------------------------------------------------------------


def test_models() -> None:
    ran = run("models")
    lines = ran.out.splitlines()
    assert ran.status == 0 and ran.err == ""
    assert [line.split()[0] for line in lines] == ["name", *MODELS]
    row = next(line for line in lines if line.startswith("dinov3_vitb16 "))
    assert row.split("  ")[0] == "dinov3_vitb16" and " 85.7 M " in row and " DINOv3 License " in row
    assert row.endswith("  facebook/dinov3-vitb16-pretrain-lvd1689m")


def test_models_by_pattern_and_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--facebook--dinov2-small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(40 * "a")
    (repository / "snapshots" / (40 * "a")).mkdir(parents=True)
    (repository / "snapshots" / (40 * "a") / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = json.loads(run("models", "DINOv2_vits14*", "--json").out)
    assert [row["name"] for row in found] == ["dinov2_vits14", "dinov2_vits14_reg"]
    assert found[0] == {
        "name": "dinov2_vits14", "family": "dinov2", "width": 384, "blocks": 12, "heads": 6, "patch_size": 14,
        "registers": 0, "parameters": 22056576, "licence": "Apache-2.0", "gated": False,
        "cached": str(repository / "snapshots" / (40 * "a")), "weights": "facebook/dinov2-small",
        "copy": "timm/vit_small_patch14_dinov2.lvd142m",
    }  # fmt: skip
    assert found[1]["cached"] is None
    assert [line.split()[0] for line in run("models", "sat").out.splitlines()][1:] == [n for n in MODELS if "sat" in n]
    refused(1, "no model has 'vits-16' in its name", "models", "vits-16")
