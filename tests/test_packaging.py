"""What is built and installed is the source tree, no more and no less."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import dinov3_infer

ROOT = Path(__file__).parent.parent


def lacking(name: str, least: int = 0) -> bool:
    """By metadata: looking for the spec of pip would switch off setuptools' distutils, which inductor needs."""
    try:
        return int(version(name).split(".")[0]) < least
    except PackageNotFoundError:
        return True


NEEDED = [name for name, least in (("build", 1), ("pip", 23), ("setuptools", 77)) if lacking(name, least)]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NEEDED), reason=f"missing or too old: {NEEDED}")]


def run(*command: str | Path, cwd: str | Path) -> str:
    """Output of a command; its errors are shown where it fails."""
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
    """The sdist, and the wheel that is built from it; from a copy, so that the checkout stays clean."""
    copied, out = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copied, ignore=leave)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=copied)
    sdist, wheel = list(out.glob("*.tar.gz")), list(out.glob("*.whl"))
    assert len(sdist) == len(wheel) == 1
    return {"sdist": sdist[0], "wheel": wheel[0]}


def test_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    """The source tree with py.typed, the licence, two top-level names."""
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        info = f"dinov3_infer-{dinov3_infer.__version__}.dist-info"
        assert {name for name in names if not name.startswith(f"{info}/")} == source_tree()
        assert "dinov3_infer/py.typed" in names
        assert wheel.read(f"{info}/top_level.txt").decode().split() == ["dinov3_infer", "dinov3_infer_kernels"]
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = wheel.read(f"{info}/METADATA").decode()
    assert built["wheel"].name == f"dinov3_infer-{dinov3_infer.__version__}-py3-none-any.whl"
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata
    assert not any(
        name in line for line in metadata.splitlines() if "Requires-Dist" in line for name in ("timm", "torchvision")
    )


def test_sdist_holds_what_a_build_needs(built: dict[str, Path]) -> None:
    """The source tree and what tools want at the root; no tests, since half of a suite cannot run."""
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in (m.name for m in sdist.getmembers() if m.isfile())}
    packages = {name.removeprefix("kernels/") for name in names if name.startswith(("dinov3_infer/", "kernels/"))}
    assert packages == source_tree()
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    assert not {name for name in names if name.startswith("tests/")}


def test_installed_wheel(built: dict[str, Path], tmp_path: Path) -> None:
    """Installed into an environment of its own, far from the checkout: imports, version, a model that runs."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = next(p for p in (tmp_path / "env/bin/python", tmp_path / "env/Scripts/python.exe") if p.exists())
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        built["wheel"],
        cwd=tmp_path,
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd="/").strip())
    # torch and the rest are borrowed; the environment's own packages come first
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    script = (
        "import dinov3_infer, importlib.metadata, torch\n"
        "model = dinov3_infer.Backbone.from_config('nano', seed=0)\n"
        "features = model.extract_features(torch.zeros(3, 32, 32, dtype=torch.uint8), size=32)\n"
        "print(dinov3_infer.__file__, dinov3_infer.__version__, importlib.metadata.version('dinov3-infer'),"
        " *features.embedding.shape)"
    )
    file, *facts = run(python, "-c", script, cwd="/").split()
    assert Path(file).is_relative_to(site)
    assert facts == [dinov3_infer.__version__, dinov3_infer.__version__, "1", "192"]
