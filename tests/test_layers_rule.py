"""Imports run one way.  Read from the source alone: nothing is imported here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dinov3_infer"
KERNELS = ROOT / "kernels" / "dinov3_infer_kernels"

# A module imports from lines above its own only.  A package counts as one module.
ORDER = (
    "errors keys",
    "rope files packed writing",
    "packing attention links fused",
    "access places",
    "layers images",
    "vit preprocess sources",
    "facets features zoo frozen",
    "interfaces optimize",
    "configs hub batching",
    "weights embed",
    "bulk",
    "extract",
    "saving traced",
    "cards export",
    "backbone",
    "tasks ray",
    "train bench",
    "torchhub cli",
    "__main__",
)
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line.split()}
FOREIGN = {"transformers", "timm", "torchvision", "peft", "triton", "onnx", "onnxruntime", "openvino", "nncf"}
# Inside functions only: contestants are loaded when somebody asks how fast they are, an engine to check its file.
GUESTS = {
    "bench/contestants.py": {"transformers", "timm", "onnxruntime", "openvino", "nncf"},
    "export.py": {"onnx", "onnxruntime"},
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`dinov3_infer/vit.py` -> vit, `dinov3_infer/tasks/pca.py` -> tasks."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(dots, dotted name) of every import statement, those inside functions too."""
    return [found for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for found in named(node)]


def named(node: ast.AST) -> list[tuple[int, str]]:
    """(dots, dotted name) of what a statement imports; of others nothing."""
    if isinstance(node, ast.Import):
        return [(0, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.level, name) for name in ([node.module] if node.module else [a.name for a in node.names])]
    return []


def ours(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports."""
    depth = len(path.relative_to(PACKAGE).parts)  # that many dots lead to the package itself
    return {name.split(".")[0] for dots, name in imports(path) if dots == depth}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_lower_ones_only(path: Path) -> None:
    """Every module has its place in the table above, and imports only what stands before it."""
    module = module_of(path)
    if module == "__init__":
        return
    assert module in LEVEL, f"give {module} its place in ORDER"
    upwards = {name for name in ours(path) - {module} if LEVEL.get(name, -1) >= LEVEL[module]}
    assert not upwards, f"{module} imports {upwards}, which do not stand below it"


def test_the_table_has_no_dead_names() -> None:
    """A name in the table is a module."""
    assert set(LEVEL) <= {module_of(path) for path in sources()}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_foreign_and_absolute_imports(path: Path) -> None:
    """No module needs another implementation, and inside the package imports are relative and stay inside."""
    depth = len(path.relative_to(PACKAGE).parts)
    refused = FOREIGN - GUESTS.get(path.relative_to(PACKAGE).as_posix(), set()) | {"dinov3_infer"}
    for dots, name in imports(path):
        assert dots <= depth, f"{'.' * dots}{name} leaves the package"
        assert dots or name.split(".")[0] not in refused, name
        assert dots or name != "dinov3_infer_kernels" or module_of(path) == "attention", "attention alone knows kernels"


@pytest.mark.parametrize("path", [PACKAGE / name for name in GUESTS], ids=list(GUESTS))
def test_guests_are_imported_when_they_are_asked_for(path: Path) -> None:
    """Not when the module is: each is optional, and costs seconds."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside:
            assert not any(name.split(".")[0] in FOREIGN for dots, name in named(node) if not dots), ast.unparse(node)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_pickles_are_never_trusted(path: Path) -> None:
    """Every torch.load says weights_only=True, and nothing unpickles by other means."""
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
    """The kernel package could be shipped by itself."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    assert {name.split(".")[0] for dots, name in imports(path) if not dots} <= allowed


def test_the_folder_of_kernels_is_no_package() -> None:
    """A `kernels` package at the root would shadow the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()
