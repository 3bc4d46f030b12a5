"""Images of a single grey level, which identifies them."""

from pathlib import Path

from PIL import Image

from dinov3_infer.train.batches import Data


def write(path: Path, shade: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Writes an image of one grey level, which identifies it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade,) * 3).save(path)
    return path


def shades(data: Data) -> list[int]:
    return [int(data[i][0, 0, 0]) for i in range(len(data))]


class Shades:
    """A Dataset of grey images; the grey level of each is its number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        return Image.new("RGB", (40, 40), (index % 256,) * 3)
