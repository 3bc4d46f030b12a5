"""Imports run one way, between rooms and inside each room.  The tests read the source and import nothing."""

import ast
import re
import sys
from pathlib import Path

import pytest
from repository import ROOT

PACKAGE = ROOT / "dinov3_infer"
KERNELS = ROOT / "kernels" / "dinov3_infer_kernels"

# A room imports from lines above its own only.
ROOMS = (
    "errors version typos",
    "arrays system locks web devices",
    "model",
    "images",
    "zoo",
    "checkpoints",
    "hub features recorded",
    "backbone",
    "released",
    "tasks",
    "train",
    "cli ray torchhub",
    "__main__",
)
LEVEL = {name: level for level, line in enumerate(ROOMS) for name in line.split()}
FOREIGN = {"transformers", "timm", "torchvision", "peft", "triton", "onnx", "onnxruntime", "openvino", "nncf"}
# Inside functions only: contestants are loaded when somebody asks how fast they are, an engine to check its file.
GUESTS = {
    "cli/bench/contestants.py": {"transformers", "timm"},
    "cli/bench/engines.py": {"onnxruntime", "openvino", "nncf"},
    "checkpoints/export.py": {"onnx", "onnxruntime"},
}
KNOW_KERNELS = {"model/attention.py", "model/cpu/compiled.py"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> list[tuple[int, str]]:
    """(dots, dotted name) of every import statement, including those inside functions."""
    return [found for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for found in imported(node)]


def imported(node: ast.AST) -> list[tuple[int, str]]:
    """(dots, dotted name) of an import statement; nothing for other statements."""
    if isinstance(node, ast.Import):
        return [(0, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.level, name) for name in ([node.module] if node.module else [a.name for a in node.names])]
    return []


def modules(path: Path) -> set[str]:
    """Dotted names of the modules of this package that a file imports."""
    own = path.relative_to(PACKAGE).parts[:-1]
    return {".".join((*own[: len(own) + 1 - dots], name)) for dots, name in imports(path) if dots}


@pytest.mark.parametrize("path", sources(), ids=named)
def test_rooms_import_from_above_only(path: Path) -> None:
    """Every room is in the table and imports only rooms before it."""
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in LEVEL, f"give {room} its place in ROOMS"
    used = {name.split(".")[0] for name in modules(path)} - {room, "__init__"}
    upwards = {name for name in used if LEVEL.get(name, -1) >= LEVEL[room]}
    assert not upwards, f"{room} imports {upwards}, which do not stand above it"


def test_the_table_has_no_dead_names() -> None:
    """Every name in the table is a room."""
    assert set(LEVEL) <= {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()}


def test_there_is_no_circle() -> None:
    """Covers imports inside a room, including those inside functions."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sources()}
    needs = {
        name: {other for other in modules(path) if other in paths}
        for name, path in paths.items()
        if path.name != "__init__.py"
    }
    while needs:
        free = {name for name, others in needs.items() if not others & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}


def test_a_name_stands_in_one_room_only() -> None:
    """A command is the exception: its module in `cli` has the name of the module that it calls."""
    found: dict[str, str] = {}
    for path in sources():
        if path.stem.startswith("__") or path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        assert path.stem not in found, f"{named(path)} and {found[path.stem]}"
        found[path.stem] = named(path)
    rooms = {path.name for path in PACKAGE.rglob("*") if path.is_dir() and (path / "__init__.py").exists()}
    assert not rooms & found.keys()


@pytest.mark.parametrize("path", sources(), ids=named)
def test_files_fit_on_a_few_screens(path: Path) -> None:
    """A file has at most 350 lines, unless its first lines say why it has more."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 350 or any("350 lines" in line for line in lines[:20]), len(lines)


@pytest.mark.parametrize("path", sources(), ids=named)
def test_foreign_and_absolute_imports(path: Path) -> None:
    """No module needs another implementation; imports inside the package are relative."""
    depth = len(path.relative_to(PACKAGE).parts)
    refused = FOREIGN - GUESTS.get(path.relative_to(PACKAGE).as_posix(), set()) | {"dinov3_infer"}
    for dots, name in imports(path):
        assert dots <= depth, f"{'.' * dots}{name} leaves the package"
        assert dots or name.split(".")[0] not in refused, name
        assert dots or name != "dinov3_infer_kernels" or named(path) in KNOW_KERNELS, KNOW_KERNELS


@pytest.mark.parametrize("path", [PACKAGE / name for name in GUESTS], ids=list(GUESTS))
def test_guests_are_imported_when_they_are_asked_for(path: Path) -> None:
    """Optional packages are imported inside functions, because each takes seconds."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside:
            assert not any(name.split(".")[0] in FOREIGN for dots, name in imported(node) if not dots), ast.unparse(
                node
            )


@pytest.mark.parametrize("path", sources(), ids=named)
def test_pickles_are_never_trusted(path: Path) -> None:
    """Every torch.load has weights_only=True, and nothing else unpickles."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "eval", "exec"), called
        if called in ("torch.load", "load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", ast.unparse(node)


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_know_torch_and_triton_only(path: Path) -> None:
    """The kernel package could be shipped separately."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    assert {name.split(".")[0] for dots, name in imports(path) if not dots} <= allowed


def test_the_folder_of_kernels_is_no_package() -> None:
    """A `kernels` package at the root would shadow the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


def test_the_tree_of_the_readme_names_every_module_once() -> None:
    """The tree equals the folder: each module is under its room, and each folder has a sentence."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## Reading the code")[1].split("```text")[1].split("```")[0]
    known = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (*sources(), *KERNELS.rglob("*.py"))}
    modules = {name for name in known if not name.rpartition("/")[2].startswith("__")}
    rooms = {name.removesuffix("/__init__") for name in known if name.endswith("/__init__")}
    found: list[str] = []
    folders: list[tuple[int, str]] = []  # (indent, path) of those that a line lies in
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = [folder for folder in folders if folder[0] < indent]
        where = folders[-1][1] if folders else ""
        first = line.split()[0]
        if first.endswith("/"):
            folders.append((indent, where := f"{where}/{first[:-1]}".lstrip("/")))
            found.append(where)
            assert not folders[:-1] or len(line.split()) > 3, f"{where} has no sentence"
        words = [part.rpartition(": ")[2] for part in re.split(r"\s{2,}", line.strip())]  # a sentence has spaces
        found += [name for word in words if (name := f"{where}/{word}") in modules]
    assert len(found) == len(set(found)), sorted(name for name in found if found.count(name) > 1)
    expected = modules | rooms | {"dinov3_infer/data"}
    assert set(found) == expected, (sorted(set(found) - expected), sorted(expected - set(found)))
