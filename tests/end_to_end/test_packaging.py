"""The built and installed packages hold exactly the source tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

import dinov3_infer
import setup


def lacking(name: str, least: int = 0) -> bool:
    """Uses metadata, because looking up pip's spec would switch off setuptools' distutils, which inductor needs."""
    try:
        return int(version(name).split(".")[0]) < least
    except PackageNotFoundError:
        return True


# what is in the packages besides Python
DATA = {
    "dinov3_infer_kernels/cpu.c",
    "dinov3_infer/data/explore/page.html",
    "dinov3_infer/data/labels/ade20k.txt",
    "dinov3_infer/data/labels/imagenet1k.txt",
    "dinov3_infer/data/labels/voc2012.txt",
    *(f"dinov3_infer/data/text/{name}" for name in ("LICENSE", "merges.txt.gz", "templates.txt")),
    *(f"{package}/py.typed" for package in ("dinov3_infer", "dinov3_infer_kernels")),
    *(f"dinov3_infer/data/samples/{name}" for name in ("cat.png", "coffee.png", "golden.safetensors", "rocket.png")),
}
if (ROOT / "dinov3_infer/data/nano").is_dir():  # once its weights are embedded
    NANO = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    DATA |= {f"dinov3_infer/data/nano/{name}" for name in NANO}
ROOT_FILES = {
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "hubconf.py",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
}
NEEDED = [name for name, least in (("build", 1), ("pip", 23), ("setuptools", 77)) if lacking(name, least)]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NEEDED), reason=f"missing or too old: {NEEDED}")]


def run(*command: str | Path, cwd: str | Path) -> str:
    """Output of a command; if it fails, its errors are shown."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def source_tree() -> set[str]:
    """Files of the two packages, as the wheel names them."""
    found = set()
    for package in (ROOT / "dinov3_infer", ROOT / "kernels" / "dinov3_infer_kernels"):
        files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        found |= {path.relative_to(package.parent).as_posix() for path in files}
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and the wheel built from it, made from a copy, so that the checkout stays clean."""
    copied, out = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copied, ignore=leave)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=copied)
    sdist, wheel = list(out.glob("*.tar.gz")), list(out.glob("*.whl"))
    assert len(sdist) == len(wheel) == 1
    return {"sdist": sdist[0], "wheel": wheel[0]}


def test_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    """The wheel holds the source tree with py.typed, the licence, and two top-level names."""
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        info = f"dinov3_infer-{dinov3_infer.__version__}.dist-info"
        assert {name for name in names if not name.startswith(f"{info}/")} == source_tree()
        assert {name for name in names if not name.endswith(".py") and "dist-info" not in name} == DATA
        scripts = wheel.read(f"{info}/entry_points.txt").decode().split("\n")
        assert scripts[:2] == ["[console_scripts]", "dinov3-infer = dinov3_infer.cli:main"] and not any(scripts[2:])
        assert wheel.read(f"{info}/top_level.txt").decode().split() == ["dinov3_infer", "dinov3_infer_kernels"]
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = wheel.read(f"{info}/METADATA").decode()
    assert built["wheel"].name == f"dinov3_infer-{dinov3_infer.__version__}-py3-none-any.whl"
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert setup.long_description(readme, setup.address()).strip() in metadata
    assert not any(
        name in line for line in metadata.splitlines() if "Requires-Dist" in line for name in ("timm", "torchvision")
    )


@pytest.mark.parametrize(
    "given, without, beside",
    [
        ("![A cat](examples/cat.jpg)", "", "![A cat](https://example.org/me/it/raw/HEAD/examples/cat.jpg)"),
        ("see [a guide](examples/guides/gpu.md).", "see a guide.",
         "see [a guide](https://example.org/me/it/blob/HEAD/examples/guides/gpu.md)."),
        ("[its page](https://example.org/x) and [below](#tests)",) * 3,
    ],
    ids=["an image", "a relative link", "whole addresses"],
)  # fmt: skip
def test_links_of_the_long_description(given: str, without: str, beside: str) -> None:
    """Relative links become addresses below the project's, or go where it has none."""
    assert setup.long_description(given, None) == without
    assert setup.long_description(given, "https://example.org/me/it/") == beside


def test_sdist_holds_what_a_build_needs(built: dict[str, Path]) -> None:
    """The sdist holds the packages, the examples and the files that tools need at the root, and no tests."""
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in (m.name for m in sdist.getmembers() if m.isfile())}
    packages = {name.removeprefix("kernels/") for name in names if name.startswith(("dinov3_infer/", "kernels/"))}
    assert packages == source_tree()
    examples = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*") if path.is_file()}
    others = {name for name in names if not name.startswith(("dinov3_infer/", "kernels/", "dinov3_infer.egg-info/"))}
    assert others == ROOT_FILES | {name for name in examples if "__pycache__" not in name}


class Environment:
    """A virtual environment outside the checkout that borrows torch; its own packages come first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.scripts = next(p for p in (folder / "bin", folder / "Scripts") if p.is_dir())
        self.python = next(p for p in (self.scripts / "python", self.scripts / "python.exe") if p.exists())
        self.site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        borrowed = folder.parent / "borrowed"  # all but this package, which may be installed where the tests run
        borrowed.mkdir()
        for entry in {*map(Path, (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))}:
            for item in entry.iterdir():
                if not item.name.startswith(("dinov3_infer", "__editable__")):
                    (borrowed / item.name).symlink_to(item)
        (self.site / "borrowed.pth").write_text(str(borrowed))

    def ask(self, script: str) -> str:
        return run(self.python, "-c", script, cwd="/").strip()

    def command(self, *arguments: str | Path) -> str:
        """Path of the installed command."""
        return run(next(self.scripts.glob("dinov3-infer*")), *arguments, cwd="/")

    def pip(self, *arguments: str | Path, offline: bool = True) -> None:
        what, *rest = arguments
        options = ["--no-deps", *(["--no-index"] if offline else [])] if what == "install" else ["--yes"]
        run(sys.executable, "-m", "pip", "--python", self.python, what, "--quiet", *options, *rest, cwd="/")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


def test_installed_wheel(built: dict[str, Path], environment: Environment, tmp_path: Path) -> None:
    """Covers imports, version, a model that runs, and commands that read data of the package."""
    environment.pip("install", built["wheel"])
    script = (
        "import dinov3_infer, importlib.metadata, torch\n"
        "model = dinov3_infer.Backbone.from_config('nano', seed=0)\n"
        f"model.save_pretrained({str(tmp_path / 'nano')!r})\n"
        "features = model.extract_features(torch.zeros(3, 32, 32, dtype=torch.uint8), size=32)\n"
        "print(dinov3_infer.__file__, dinov3_infer.__version__, importlib.metadata.version('dinov3-infer'),"
        " *features.embedding.shape)"
    )
    file, *facts = environment.ask(script).split()
    assert Path(file).is_relative_to(environment.site)
    assert facts == [dinov3_infer.__version__, dinov3_infer.__version__, "1", "192"]
    assert environment.command("--version") == f"dinov3-infer {dinov3_infer.__version__}\n"
    report = environment.command("doctor")
    assert f"in {environment.site / 'dinov3_infer'}" in report and report.endswith("works\n")
    cat, out = ROOT / "examples" / "cat.jpg", tmp_path / "cat.npy"
    environment.command("embed", cat, "-o", out, "-m", tmp_path / "nano")
    assert out.stat().st_size > 192 * 4


def test_editable_install(built: dict[str, Path], environment: Environment, tmp_path: Path) -> None:
    """Both packages come from the checkout, which is not on the path itself: `import kernels` finds nothing there."""
    with tarfile.open(built["sdist"]) as packed:
        packed.extractall(tmp_path, filter="data")
    checkout = next(tmp_path.glob("dinov3_infer-*"))
    environment.pip("install", "--no-build-isolation", "--editable", checkout)
    script = (
        "import importlib.util as u; print(*(u.find_spec(n).origin for n in ('dinov3_infer', 'dinov3_infer_kernels')))"
    )
    ours, kernels = environment.ask(script).split()
    assert Path(ours).is_relative_to(checkout) and Path(kernels).is_relative_to(checkout / "kernels")
    where = environment.ask("import importlib.util as u; s = u.find_spec('kernels'); print(s and vars(s))")
    assert str(checkout) not in where
    assert environment.command("--version") == f"dinov3-infer {dinov3_infer.__version__}\n"


STAND_IN = {
    "kernels/__init__.py": "def get_kernel(): return 'theirs'\n",
    "kernels-9.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 9\n",
    "kernels-9.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "kernels-9.dist-info/RECORD": "kernels/__init__.py,,\nkernels-9.dist-info/METADATA,,\n"
    "kernels-9.dist-info/WHEEL,,\nkernels-9.dist-info/RECORD,,\n",
}
BESIDE = """
import importlib.util as u, kernels, torch, dinov3_infer
assert callable(kernels.get_kernel) and "env" in kernels.__file__, kernels.__file__
if u.find_spec("triton"):
    from dinov3_infer_kernels import gpu as dinov3_infer_kernels
    assert dinov3_infer_kernels.forward and kernels.__file__ != dinov3_infer_kernels.__file__
model = dinov3_infer.Backbone.from_config("nano", seed=0)
print(*model.extract_features(torch.zeros(3, 32, 32), size=32).embedding.shape)
"""


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.data)], ids=["stand-in", "real"])
def test_beside_the_kernels_of_hugging_face(
    real: bool, built: dict[str, Path], environment: Environment, tmp_path: Path
) -> None:
    """In either order of installation both import, and removing ours leaves theirs complete."""
    if real:
        environment.pip("install", "kernels", offline=False)
    else:
        with zipfile.ZipFile(tmp_path / "kernels-9-py3-none-any.whl", "w") as wheel:
            for name, text in STAND_IN.items():
                wheel.writestr(name, text)
        environment.pip("install", tmp_path / "kernels-9-py3-none-any.whl")
    theirs = sorted(path for path in environment.site.rglob("kernels*/**/*") if path.suffix != ".pyc")
    environment.pip("install", built["wheel"])
    assert environment.ask(BESIDE) == "1 192"
    environment.pip("uninstall", "dinov3-infer")
    assert not list(environment.site.glob("dinov3_infer*"))
    assert [path for path in theirs if path.is_file()] == [path for path in theirs if not path.is_dir()]
    assert environment.ask("import kernels; print(callable(kernels.get_kernel))") == "True"


MOST_PACKAGES = 15  # of the default install beyond torch and what torch brings


def needed(*requirements: str) -> set[str]:
    """The packages that pip installs for these, by the metadata of those that are here."""
    todo, found = [Requirement(text) for text in requirements], set()
    while todo:
        one = todo.pop()
        if (key := (canonicalize_name(one.name), frozenset(one.extras))) in found:
            continue
        found.add(key)
        for text in requires(one.name) or ():
            other = Requirement(text)
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in {"", *one.extras}):
                todo.append(other)
    return {name for name, _ in found}


def test_the_default_install_is_small() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    beyond = needed(*project["dependencies"]) - needed("torch")
    assert len(beyond) <= MOST_PACKAGES, sorted(beyond)


def test_every_extra_that_is_named_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [path for top in ("dinov3_infer", "kernels", "examples") for path in (ROOT / top).rglob("*")]
    texts = [ROOT / "README.md", *(path for path in texts if path.suffix in (".py", ".md"))]
    named = [re.findall(r"dinov3-infer\[([\w,]+)\]", path.read_text(encoding="utf-8")) for path in texts]
    found = {extra for names in named for name in names for extra in name.split(",")}
    assert found and found <= set(project["optional-dependencies"]), found
