"""Windows that cover an image, means where they overlap, and the largest score at another size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_infer.released import windows
from dinov3_infer.released.windows import largest, over_windows, palette


@pytest.mark.parametrize(
    ("size", "tops", "lefts"),
    [
        ((512, 512), [0], [0]), ((300, 200), [0], [0]), ((512, 683), [0], [0, 171]), ((512, 853), [0], [0, 341]),
        ((512, 854), [0], [0, 341, 342]), ((900, 1500), [0, 341, 388], [0, 341, 682, 988]),
    ],
)  # fmt: skip
def test_windows(size: tuple[int, int], tops: list[int], lefts: list[int]) -> None:
    """512 pixels every 341, the last at the border, the mean where they overlap."""
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    seen = []

    def score(window: Tensor) -> Tensor:
        seen.append(window)
        return window * len(seen)

    found = over_windows(pixels, 512, 341, score)
    corners = [(top, left) for top in tops for left in lefts]
    total, count = torch.zeros(2, 3, *size), torch.zeros(size)
    for number, (top, left) in enumerate(corners, 1):
        rows, columns = slice(top, min(top + 512, size[0])), slice(left, min(left + 512, size[1]))
        assert torch.equal(seen[number - 1], pixels[:, :, rows, columns])
        total[:, :, rows, columns] += number * pixels[:, :, rows, columns]
        count[rows, columns] += 1
    assert len(seen) == len(corners) and count.min() >= 1
    torch.testing.assert_close(found, total / count)


def test_few_classes_at_a_time_are_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(21, 9, 12, generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(scores[None], size=(50, 70), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    for numbers in (1, 4 * 3500, 2**26):
        monkeypatch.setattr(windows, "_AT_A_TIME", numbers)
        assert torch.equal(largest(scores, (50, 70)), expected)


def test_colours_differ() -> None:
    """As in the label images of PASCAL VOC, whose first colours are known."""
    assert palette(4) == ((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert len(set(palette(255))) == 255 and (0, 0, 0) not in palette(255)
