"""Pictures of one shade, by which they are known again."""

from pathlib import Path

from PIL import Image

from dinov3_infer.train.batches import Data


def write(path: Path, shade: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A picture of one shade, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade,) * 3).save(path)
    return path


def shades(data: Data) -> list[int]:
    return [int(data[i][0, 0, 0]) for i in range(len(data))]


class Shades:
    """A Dataset of grey pictures, the number of each is its shade."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        return Image.new("RGB", (40, 40), (index % 256,) * 3)
