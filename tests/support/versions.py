"""The default tests with the oldest and the newest versions that the package claims.

    python tests/support/versions.py [NAME ...] [--log DIR]

Each row of VERSIONS is a fresh virtual environment with the pinned packages and the tests' requirements, in which the
default tests run.  One line a row is printed: its name, the versions, and the last line of pytest.  The exit status is
1 if a row failed.  CI does not run this: it downloads gigabytes and takes about ten minutes a row on two cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NEWEST = [f"{ROOT}[test]", "torch==2.14.*"]
OLDEST = [  # the package's oldest, and the newest tools of the tests that work with them
    str(ROOT), "torch==2.8.*", "numpy==1.26.*", "pillow==10.3.*", "safetensors==0.8.*", "tqdm==4.66.*",
    "transformers>=5", "peft==0.18.*", "pyarrow==15.*", "ftfy", "regex", "pytest", "pytest-xdist", "ruff", "mypy",
    "build",
]  # fmt: skip
VERSIONS = {  # name -> the interpreter, what is installed
    "python 3.11, oldest": ("python3.11", OLDEST),
    "python 3.11, newest": ("python3.11", NEWEST),
    "python 3.12, newest": ("python3.12", NEWEST),
    "python 3.13, newest": ("python3.13", NEWEST),
}
SHOWN = ("torch", "numpy", "pillow", "safetensors", "huggingface-hub", "transformers", "triton")
TOLD = "from importlib.metadata import version; print(', '.join(f'{n} {version(n)}' for n in %r))"


def outcome(name: str, folder: Path, log: Path) -> bool:
    """Whether the default tests pass in the environment of a row; what was printed goes to a file in `log`."""
    executable, requirements = VERSIONS[name]
    environment = folder / name.replace(", ", "-").replace(" ", "")
    python = environment / "bin" / "python"
    subprocess.run([executable, "-m", "venv", environment], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *requirements], check=True, cwd=folder)
    told = subprocess.run([python, "-c", TOLD % (SHOWN,)], check=True, capture_output=True, text=True, cwd=folder)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    target = log / f"{environment.name}.log"
    with target.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "auto"], cwd=ROOT, env=clean, stdout=file, stderr=file
        )
    last = target.read_text(encoding="utf-8").strip().splitlines()[-1]
    print(f"{name}: {told.stdout.strip()}: {last}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"rows: {', '.join(map(repr, VERSIONS))} (default: all)"
    )
    parser.add_argument("--log", type=Path, default=Path("."), help="folder of the logs (default: the present one)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in VERSIONS]
    if unknown:
        parser.error(f"no row is named {unknown[0]!r}; the rows are {', '.join(map(repr, VERSIONS))}")
    with tempfile.TemporaryDirectory() as folder:
        passed = [outcome(name, Path(folder), args.log.resolve()) for name in args.names or VERSIONS]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
