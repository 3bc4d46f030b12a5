"""Small heads on frozen feature maps: dense ones (linear, DPT), and queries that detect and cut out.

Sources: DPT (arXiv 2103.13413), DETR (arXiv 2005.12872), MaskFormer (arXiv 2107.06278); with every patch a query, so
that a thing is found by a patch that lies on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, FINE, FUSED, BINS = 192, 64, 32, 64  # numbers of a query and of a pixel, channels of DPT, depths to choose from
SEEN = 0.01  # score that all queries start with: most patches answer for nothing
FADE = 8.0  # how much a mask loses over the width of the picture, times what its query says


class Linear(nn.Module):
    """Maps [B, C, h, w] -> [B, out, h, w]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(maps)  # type: ignore[no-any-return]


class DPT(nn.Module):
    """Maps of four layers [B, 4 * C, h, w], shallow first -> [B, out, 4h, 4w]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels // 4), nn.Conv2d(channels // 4, FUSED, 1)) for _ in range(4)
        )
        self.fuse = nn.ModuleList(self.residual() for _ in range(4))
        self.out = nn.Sequential(self.residual(), nn.Conv2d(FUSED, out, 1))

    @staticmethod
    def residual() -> nn.Sequential:
        return nn.Sequential(
            nn.GELU(), nn.Conv2d(FUSED, FUSED, 3, padding=1), nn.GELU(), nn.Conv2d(FUSED, FUSED, 3, padding=1)
        )

    def forward(self, maps: Tensor) -> Tensor:
        x = maps.new_zeros(1)
        shallow_last = list(zip(self.project, maps.chunk(4, dim=1), self.fuse, strict=True))[::-1]
        for (project, one, fuse), scale in zip(shallow_last, (0.5, 1, 2, 4), strict=True):
            size = [round(n * scale) for n in maps.shape[2:]]
            y = F.interpolate(project(one), size=size, mode="bilinear", antialias=scale < 1)
            y = y if scale == 0.5 else y + F.interpolate(x, size=size, mode="bilinear")
            x = y + fuse(y)
        return self.out(x)  # type: ignore[no-any-return]


def layers_of(head: str, depth: int) -> list[int]:
    """The blocks that a head reads, of a backbone with `depth` of them: the last, or four evenly spread."""
    return [depth - 1] if head == "linear" else [depth * i // 4 - 1 for i in (1, 2, 3, 4)]


class Depth(nn.Module):
    """Cached maps [B, C, h, w] -> depth [B, h', w'], between the least and the largest of the training."""

    def __init__(self, channels: int, head: str, near: float, far: float) -> None:
        super().__init__()
        self.head = (Linear if head == "linear" else DPT)(channels, BINS)
        self.register_buffer("bins", torch.linspace(near, far, BINS))

    def forward(self, maps: Tensor) -> Tensor:
        weights = self.head(maps).relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), self.bins)


def centres(maps: Tensor) -> Tensor:
    """Of the cells of maps [B, C, h, w] as (x, y) in 0..1, [h * w, 2]."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in maps.shape[2:]), indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1).to(maps)


class Queries(nn.Module):
    """Maps [B, C, h, w] -> patches that have seen each other [B, P, WIDTH], scores [B, P, K], places (x, y) [P, 2]."""

    def __init__(self, channels: int, classes: int, depth: int = 1) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, WIDTH))
        self.place = nn.Sequential(nn.Linear(2, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.score = nn.Linear(WIDTH, classes)
        nn.init.constant_(self.score.bias, float(torch.tensor(SEEN).logit()))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = centres(maps)
        queries = self.blocks(self.project(maps.flatten(2).mT) + self.place(places * 2 - 1))
        return queries, self.score(queries), places


class Detector(nn.Module):
    """Maps [B, C, h, w] -> scores [B, P, K] before the sigmoid, boxes [B, P, 4] in 0..1."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.queries = Queries(channels, classes)
        self.box = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 4))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        queries, scores, places = self.queries(maps)
        sides = (self.box(queries) - 1.5).sigmoid()  # how far each side is from the middle of the patch
        return scores, torch.cat((places - sides[..., :2], places + sides[..., 2:]), dim=-1)


class MaskQueries(nn.Module):
    """Maps [B, C, h, w] -> scores [B, P, K] and masks [B, P, 2h, 2w], both before the sigmoid.

    A mask fades with the square of the distance from its patch, each as fast as its query says: two things that look
    alike stay two.
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
        queries, scores, places = self.queries(maps)
        pixels = self.finer(queries.mT.unflatten(2, maps.shape[2:]))
        alike = torch.einsum("bpc,bchw->bphw", self.vector(queries), pixels) * FINE**-0.5
        far = torch.cdist(places, centres(pixels)).square().unflatten(1, pixels.shape[2:])
        return scores, alike - FADE * F.softplus(self.fade(queries))[..., None] * far
