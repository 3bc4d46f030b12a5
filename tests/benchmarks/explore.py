"""`explore` in a real Chromium: bytes, the largest error of a cosine over all pairs, milliseconds of a hover.

    python tests/benchmarks/explore.py [--out records/explore.json] [--shots FOLDER]

The page has ten square images of 768 pixels, cut from the photographs of the tests, with the features of `nano` or a
real DINOv2 ViT-S/14.  Needs `pip install playwright onnx` and a Chromium on the path.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import fetch  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from dinov3_infer import Backbone  # noqa: E402
from dinov3_infer.tasks.explore import explore, largest_error, pack  # noqa: E402

SIDE, HOVERS = 768, 60


def images(folder: Path) -> list[str]:
    """Paths of ten squares."""
    found: list[str] = []
    for name, photograph in fetch.photographs().items():
        width, height = photograph.size
        side = min(width, height)
        boxes = ((0, 0, side, side), (width - side, height - side, width, height), (side // 4, side // 4, side, side))
        for number, box in enumerate(boxes[: 3 if len(found) < 6 else 2]):
            path = folder / f"{name}_{number}.png"
            photograph.crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(path)
            found.append(str(path))
    return found


def hovers(page: Any) -> list[float]:
    """Milliseconds of the script from a new patch until all images are coloured."""
    view, took = page.locator(".view").first.bounding_box(), []
    for i in range(HOVERS):
        page.mouse.move(view["x"] + view["width"] * (0.02 + 0.016 * i), view["y"] + view["height"] * (0.1 + 0.013 * i))
        page.wait_for_timeout(120)
        took.append(float(page.evaluate("document.documentElement.dataset.milliseconds")))
    return took


def measure(
    bb: Backbone, name: str, paths: list[str], folder: Path, chromium: Any, shots: Path | None
) -> dict[str, Any]:
    page_file = folder / f"{name}.html"
    explore(bb, paths, page_file, size=SIDE)
    tokens = torch.cat([f.patch_tokens[0] for f in bb.iter_features(paths, size=SIDE, fit="native")])
    error, pairs = largest_error(tokens, pack(tokens))
    text = page_file.read_text("utf-8")
    without_images = len(re.sub(r'"jpeg": "[^"]*"', "", text))
    page = chromium.new_context(offline=True, viewport={"width": 1280, "height": 860}).new_page()
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-ready]")
    took = hovers(page)
    if shots is not None:
        page.screenshot(path=shots / f"{name}.png")
    return {
        "model": name, "width": tokens.shape[1], "patches": len(tokens), "bytes": len(text),
        "bytes_without_images": without_images, "largest_error": error, "pairs": pairs,
        "hover_ms": {"median": statistics.median(took), "max": max(took), "of": len(took)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "records" / "explore.json", help="record to write"
    )
    parser.add_argument("--shots", type=Path, help="folder for a screenshot of each page")
    args = parser.parse_args()
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = Path(scratch)
        paths = images(folder)
        weights, _ = fetch.write_dinov2_vits14(folder)
        chromium = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        models = {"nano": "nano", "dinov2_vits14 (tuned for saliency)": weights}
        rows = [
            measure(Backbone.from_pretrained(at, device="cpu"), name, paths, folder, chromium, args.shots)
            for name, at in models.items()
        ]
        record = {
            "side": SIDE,
            "images": len(paths),
            "chromium": chromium.version,
            "cores": os.cpu_count(),
            "rows": rows,
        }
        chromium.close()
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
