"""Small heads on frozen feature maps: dense ones (linear, DPT), and queries for detection and masks.

Sources: DPT (arXiv 2103.13413), DETR (arXiv 2005.12872), MaskFormer (arXiv 2107.06278).  Here every patch is a query,
so that a patch on an object finds it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, FINE, FUSED, BINS = 192, 64, 32, 64  # widths of a query and of a pixel, channels of DPT, number of depths
SEEN = 0.01  # initial score of all queries, low because most patches match no object
FADE = 8.0  # decrease of a mask over the width of the image, times a factor per query


class Linear(nn.Module):
    """A batch norm and a 1 x 1 convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, C, h, w] to [B, out, h, w]."""
        return self.layers(maps)  # type: ignore[no-any-return]


class DPT(nn.Module):
    """Fuses the maps of four layers from coarse to fine."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels // 4), nn.Conv2d(channels // 4, FUSED, 1)) for _ in range(4)
        )
        self.fuse = nn.ModuleList(self.residual() for _ in range(4))
        self.out = nn.Sequential(self.residual(), nn.Conv2d(FUSED, out, 1))

    @staticmethod
    def residual() -> nn.Sequential:
        """The convolutions of a residual block."""
        return nn.Sequential(
            nn.GELU(), nn.Conv2d(FUSED, FUSED, 3, padding=1), nn.GELU(), nn.Conv2d(FUSED, FUSED, 3, padding=1)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of four layers [B, 4 * C, h, w], shallow first, to [B, out, 4h, 4w]."""
        x = maps.new_zeros(1)
        shallow_last = list(zip(self.project, maps.chunk(4, dim=1), self.fuse, strict=True))[::-1]
        for (project, one, fuse), scale in zip(shallow_last, (0.5, 1, 2, 4), strict=True):
            size = [round(n * scale) for n in maps.shape[2:]]
            y = F.interpolate(project(one), size=size, mode="bilinear", antialias=scale < 1)
            y = y if scale == 0.5 else y + F.interpolate(x, size=size, mode="bilinear")
            x = y + fuse(y)
        return self.out(x)  # type: ignore[no-any-return]


def layers_of(head: str, depth: int) -> list[int]:
    """The blocks that a head reads from a backbone of `depth` blocks: the last one, or four evenly spread."""
    return [depth - 1] if head == "linear" else [depth * i // 4 - 1 for i in (1, 2, 3, 4)]


class Depth(nn.Module):
    """Predicts depth between the least and the largest depth of the training."""

    def __init__(self, channels: int, head: str, near: float, far: float) -> None:
        super().__init__()
        self.head = (Linear if head == "linear" else DPT)(channels, BINS)
        self.register_buffer("bins", torch.linspace(near, far, BINS))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B, C, h, w] to depth [B, h', w']."""
        weights = self.head(maps).relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), self.bins)


def centres(maps: Tensor) -> Tensor:
    """Centres (x, y) in 0..1 of the cells of maps [B, C, h, w], [h * w, 2]."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in maps.shape[2:]), indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1).to(maps)


class Queries(nn.Module):
    """Patches as queries that attend to each other, with class scores."""

    def __init__(self, channels: int, classes: int, depth: int = 1) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, WIDTH))
        self.place = nn.Sequential(nn.Linear(2, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.score = nn.Linear(WIDTH, classes)
        nn.init.constant_(self.score.bias, float(torch.tensor(SEEN).logit()))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps [B, C, h, w] to queries [B, P, WIDTH], scores [B, P, K] and positions (x, y) [P, 2]."""
        places = centres(maps)
        queries = self.blocks(self.project(maps.flatten(2).mT) + self.place(places * 2 - 1))
        return queries, self.score(queries), places


class Detector(nn.Module):
    """Predicts a box around each patch."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.queries = Queries(channels, classes)
        self.box = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 4))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, C, h, w] to scores [B, P, K] before the sigmoid and boxes [B, P, 4] in 0..1."""
        queries, scores, places = self.queries(maps)
        sides = (self.box(queries) - 1.5).sigmoid()  # distance of each side from the patch centre
        return scores, torch.cat((places - sides[..., :2], places + sides[..., 2:]), dim=-1)


class MaskQueries(nn.Module):
    """Predicts a mask for each patch.

    A mask fades with the squared distance from its patch, at a rate that its query sets, so that two objects that look
    alike get two masks.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.queries = Queries(channels, classes)
        self.vector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, FINE))
        self.finer = nn.Sequential(
            nn.ConvTranspose2d(WIDTH, FINE, 2, stride=2), nn.GELU(), nn.Conv2d(FINE, FINE, 3, padding=1)
        )
        self.fade = nn.Linear(WIDTH, 1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, C, h, w] to scores [B, P, K] and masks [B, P, 2h, 2w], both before the sigmoid."""
        queries, scores, places = self.queries(maps)
        pixels = self.finer(queries.mT.unflatten(2, maps.shape[2:]))
        alike = torch.einsum("bpc,bchw->bphw", self.vector(queries), pixels) * FINE**-0.5
        far = torch.cdist(places, centres(pixels)).square().unflatten(1, pixels.shape[2:])
        return scores, alike - FADE * F.softplus(self.fade(queries))[..., None] * far
