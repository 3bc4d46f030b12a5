"""The commit that a record is made from."""

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent


def commit(checkout: Path = HERE) -> str:
    """The commit of a checkout, with "-dirty" if any file of it beside the records was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    root = git("rev-parse", "--show-toplevel")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", root, ":(top,exclude)*/records/*")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
