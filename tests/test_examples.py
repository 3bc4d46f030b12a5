"""Examples run as a newcomer would run them."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
CAT = ROOT / "examples" / "cat.jpg"


def test_quickstart(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", CAT, "", tmp_path / "pca.png"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=True,
    )
    assert "[1, 192, 32, 48]" in run.stdout
    assert Image.open(tmp_path / "pca.png").size == (2 * 512 + 3 * 8, 341 + 2 * 8)
