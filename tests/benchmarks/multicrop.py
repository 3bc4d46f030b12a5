"""Multi-crop preparation per core: the trainer's views against lightly's DINOTransform.

    pip install lightly torchvision
    OMP_NUM_THREADS=1 python tests/benchmarks/multicrop.py

Both make two global crops of 224 pixels and eight local ones of 96, float32 and normalised, of the same four
photographs, with the augmentations of DINOv2 and DINOv3 at the probabilities in effect.  "pixels" starts from decoded
images, in the form that each library takes (a tensor, a PIL image).  "files" reads JPEG files; those of 12 megapixels
are the same photographs enlarged, which ours decodes at reduced size, as the trainer does.

Rounds alternate; a ratio is the median over the rounds of lightly's CPU time divided by ours.  The record is written
to records/multicrop.json.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent / "support")]

import conftest  # noqa: E402, F401  (lets a CUDA build of torchvision be imported beside a CPU build of torch)
import fetch  # noqa: E402
import lightly  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from lightly.transforms import DINOTransform  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from dinov3_infer.cli.doctor import cpu_name  # noqa: E402
from dinov3_infer.train.batches import open_data  # noqa: E402
from dinov3_infer.train.draws import generator  # noqa: E402
from dinov3_infer.train.views import ViewConfig, Views, collate, make_views  # noqa: E402

ROUNDS, REPEATS, PICTURES = 15, 5, 4
CONFIG = ViewConfig()
PEER = DINOTransform(  # its defaults for jitter (0.4, 0.4, 0.2, 0.1), flips, greyscale and solarisation are the same
    global_crop_scale=CONFIG.global_scale,
    local_crop_scale=CONFIG.local_scale,
    n_local_views=CONFIG.num_local,
    gaussian_blur=(*CONFIG.global_blur, CONFIG.local_blur),
)


def ours(images: list[Tensor], step: int) -> None:
    views = [make_views(image, CONFIG, generator(0, step, "views", i)) for i, image in enumerate(images)]
    together = Views(torch.stack([v.global_crops for v in views]), torch.stack([v.local_crops for v in views]), None)
    collate([together], torch.zeros(len(images), 2, 196, dtype=torch.bool), torch.arange(len(images)), CONFIG)


def theirs(images: list[Image.Image]) -> None:
    crops = [PEER(image) for image in images]
    for k in range(len(crops[0])):
        torch.stack([c[k] for c in crops])


def seconds(work: Callable[[int], None], first: int) -> float:
    begun = time.process_time()
    for step in range(first, first + REPEATS):
        work(step)
    return time.process_time() - begun


def contest(mine: Callable[[int], None], peers: Callable[[int], None]) -> dict[str, object]:
    seconds(mine, 0), seconds(peers, 0)
    rounds = []
    for i in range(ROUNDS):
        pair = [("ours", mine), ("lightly", peers)]
        took = {name: seconds(work, i * REPEATS) for name, work in (pair if i % 2 else pair[::-1])}
        rounds.append({name: 1e3 * total / REPEATS / PICTURES for name, total in took.items()})
    ratios = sorted(r["lightly"] / r["ours"] for r in rounds)
    return {
        "ratio": {"median": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]},
        "ms_per_picture": {name: statistics.median(r[name] for r in rounds) for name in ("ours", "lightly")},
        "rounds_ms_per_picture": rounds,
    }


def main() -> None:
    torch.set_num_threads(1)
    photographs = list(fetch.photographs().values())
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, size in (("files", None), ("files of 12 megapixels", (4000, 3000))):
            place = Path(folder) / kind
            place.mkdir()
            for i, picture in enumerate(photographs):
                sized = picture.resize(size, Image.Resampling.BICUBIC) if size else picture
                sized.save(place / f"{i}.jpg", quality=90)
            data, paths = open_data(place), sorted(place.iterdir())
            if not size:
                pixels, opened = list(data), [Image.open(path).convert("RGB") for path in paths]
                results["pixels"] = contest(partial(ours, pixels), lambda _, opened=opened: theirs(opened))
            results[kind] = contest(
                lambda step, data=data: ours([data.read(i, CONFIG.image_px) for i in range(len(data))], step),
                lambda _, paths=paths: theirs([Image.open(path).convert("RGB") for path in paths]),
            )
    record = {
        "what": "2 global crops of 224 and 8 local crops of 96 pixels, CPU time on one core",
        "pictures": {name: picture.size for name, picture in fetch.photographs().items()},
        "machine": {"cpu": cpu_name(), "platform": platform.platform(), "load_average": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__,
            "torchvision": torchvision.__version__, "lightly": lightly.__version__,
        },
        "results": results,
    }  # fmt: skip
    target = HERE / "records" / "multicrop.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    for name, result in results.items():
        shown, times = result["ratio"], result["ms_per_picture"]
        print(f"{name}: {shown['median']:.2f}x ({shown['lowest']:.2f} to {shown['highest']:.2f}), {times}")


if __name__ == "__main__":
    main()
