"""The parts of the examples, each against a formula or a case with a known answer."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import EXAMPLES

from dinov3_infer import Features, InputError, MissingFileError
from dinov3_infer.images.preprocess import Placement

sys.path.insert(0, str(EXAMPLES))

import anomaly  # noqa: E402
import common  # noqa: E402
import depth  # noqa: E402
import detection  # noqa: E402
import discovery  # noqa: E402
import foreground  # noqa: E402
import heads  # noqa: E402
import masks  # noqa: E402
import matching  # noqa: E402
import normals  # noqa: E402
import set_prediction  # noqa: E402
import tracking  # noqa: E402
import video  # noqa: E402


def features(tokens: torch.Tensor, grid: tuple[int, int], patch: int = 10) -> Features:
    """Features of one image without resizing, from tokens [P, C]."""
    size = (grid[0] * patch, grid[1] * patch)
    none = tokens[None, :0]
    return Features(tokens[None, 0], tokens[None, 0], none, tokens[None], grid, (Placement(size, size, (0, 0, *size)),))


def unlike(count: int, seed: int = 0) -> torch.Tensor:
    """Orthogonal vectors of length 1, [count, count]."""
    return torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(seed)))[0]


# --- one query for each object ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(0, 3), (1, 1), (2, 5), (4, 4), (5, 7)])
@pytest.mark.parametrize("kind", ["random", "ties", "negative"])
def test_assignment_is_the_cheapest_of_all(rows: int, columns: int, kind: str) -> None:
    for _ in range(20):
        cost = torch.rand(rows, columns) - (1 if kind == "negative" else 0)
        cost = (cost * 3).round() if kind == "ties" else cost
        chosen = set_prediction.assign(cost)
        assert len(set(chosen.tolist())) == rows
        every = (sum(cost[i, c] for i, c in enumerate(p)) for p in itertools.permutations(range(columns), rows))
        assert float(cost[torch.arange(rows), chosen].sum()) == pytest.approx(float(min(every, default=0)), abs=1e-5)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 1, 1), (2, 0, 3, 1), -1 / 3),
        ((0, 0, 1, 1), (1, 1, 2, 2), -1 / 2),
    ],
    ids=["same", "half", "apart", "corner"],
)
def test_overlap_of_boxes(a: tuple[int, ...], b: tuple[int, ...], expected: float) -> None:
    found = set_prediction.overlap(torch.tensor([a, a]).float()[:, None], torch.tensor([b]).float())
    assert torch.allclose(found, torch.full((2, 1), expected))


def test_losses_are_least_for_what_is_right() -> None:
    truth = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    right, wrong = (truth * 2 - 1) * 9, (1 - truth * 2) * 9
    assert set_prediction.mask_cost(right, truth) < 0.01 < 5 < set_prediction.mask_cost(wrong, truth)
    assert set_prediction.mask_cost(torch.cat((wrong, right)), truth).argmin(dim=1).tolist() == [1]
    assert set_prediction.focal(right, truth).max() < 1e-6 < 1 < set_prediction.focal(wrong, truth).min()
    scores = torch.tensor([[-9.0, 9.0], [-9.0, -9.0], [9.0, -9.0]])
    cost = set_prediction.class_cost(scores, torch.tensor([1, 0]))
    assert set_prediction.assign(cost).tolist() == [0, 2]
    chosen = [torch.tensor([0, 2])]
    right, wrong = (set_prediction.class_loss(scores[None], [torch.tensor(c)], chosen) for c in ([1, 0], [0, 1]))
    assert right < 1e-6 < 1 < wrong


def test_detector_and_mask_queries_learn_three_images_by_heart() -> None:
    torch.manual_seed(0)
    maps, size = torch.randn(3, 16, 4, 4), (32, 32)
    things = [(torch.tensor([[0.1 * i, 0.1, 0.1 * i + 0.5, 0.7]]), torch.tensor([i % 2])) for i in range(3)]
    detector = detection.train(maps, things, 2, steps=100)
    for (box, name), (scores, boxes, classes) in zip(things, detection.detect(detector, maps), strict=True):
        assert classes[0] == name and scores[0] > 3 * scores[1]
        assert set_prediction.overlap(boxes[0], box[0]) > 0.8
    segments = []
    for i in range(3):
        thing = torch.zeros(size, dtype=torch.bool)
        thing[8 * i : 8 * i + 16, 8:24] = True
        segments.append((torch.stack((~thing, thing)), torch.tensor([0, 1])))
    head = masks.train(maps, segments, 2, steps=150)
    for (true, _), found in zip(segments, masks.instances(head, maps, size), strict=True):
        labels, names = masks.panoptic(*found)
        thing = labels == 1 + names.tolist().index(1)
        assert names.tolist().count(1) == 1
        assert (thing & true[1]).sum() / (thing | true[1]).sum() > 0.7


def test_a_mask_is_largest_on_its_own_patch() -> None:
    """All patches look alike, and either side of the image is the longer one."""
    head = heads.MaskQueries(8, 2)
    torch.nn.init.zeros_(head.vector[2].weight), torch.nn.init.zeros_(head.vector[2].bias)
    masks = head(torch.randn(1, 8, 3, 5))[1][0]
    best = masks.flatten(1).argmax(dim=1)
    assert masks.shape == (15, 6, 10) and (best // 10 // 2 * 5 + best % 10 // 2).tolist() == list(range(15))


def test_panoptic_drops_what_another_covers() -> None:
    chance = torch.zeros(3, 4, 4)
    chance[0, :, :2], chance[1, :, 2:], chance[2, :, 1:3] = 0.9, 0.9, 0.8
    labels, names = masks.panoptic(torch.tensor([0.9, 0.8, 0.5]), chance, torch.tensor([3, 1, 3]))
    assert names.tolist() == [3, 1] and labels[0].tolist() == [1, 1, 2, 2]
    chance[1, :, 3], chance[2, :, 3] = 0, 0.8  # now the last segment owns a third of its pixels
    assert masks.panoptic(torch.tensor([0.9, 0.8, 0.5]), chance, torch.tensor([3, 1, 3]))[1].tolist() == [3, 1]
    labels, names = masks.panoptic(torch.tensor([0.05, 0.05, 0.05]), chance, torch.tensor([3, 1, 3]))
    assert len(names) == 0 and not labels.any()


# --- surfaces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (0.6, 0.0, 0.8), (0.0, -0.6, 0.8), (0.48, 0.64, 0.6)])
def test_normals_of_a_plane(normal: tuple[float, float, float]) -> None:
    """Seen by a pinhole camera: points X with n X = d, n towards the camera, x right, y down, z away from it."""
    size, focal = 64, 1.5
    ray = (torch.arange(size) - (size - 1) / 2) / (focal * size)
    right, up, here = normal
    distance = 2 / (here - right * ray[None] + up * ray[:, None])  # distance along z for each ray
    seen = (torch.arange(size)[:, None] * 3 + torch.arange(size)) % 7 > 1  # diagonal stripes are unknown
    found, known = normals.normals_of(torch.where(seen, distance, 0)[None], focal)
    assert torch.equal(known[0, 8:-8, 8:-8], seen[8:-8, 8:-8])
    right = found[0].permute(1, 2, 0)[known[0]]
    assert torch.allclose(right, torch.tensor(normal).expand_as(right), atol=2e-3)


def test_unknown_depth_has_no_normal_and_no_loss() -> None:
    deep = torch.full((1, 32, 32), 2.0)
    deep[0, :, :16] = 0
    assert not normals.normals_of(deep, 1.0)[1][0, :, :16].any()
    found = torch.full((1, 8, 8), 2.0)
    assert depth.loss(found, deep) < 0.01 < depth.loss(found * torch.linspace(1, 2, 8), deep)


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_depth_lies_between_the_ends_of_the_training(head: str) -> None:
    model = heads.Depth(16, head, 1.0, 5.0)
    found = model(torch.randn(2, 16, 6, 5) * 100)
    assert found.shape == ((2, 6, 5) if head == "linear" else (2, 24, 20))
    assert found.min() >= 1 and found.max() <= 5


# --- without training ------------------------------------------------------------------------------------------------


def test_matches_of_a_shifted_image() -> None:
    tokens = unlike(48).view(6, 8, 48)
    a, b = features(tokens.flatten(0, 1), (6, 8)), features(tokens.roll((1, 2), (0, 1)).flatten(0, 1), (6, 8))
    here, there = matching.sparse(a, b, 30)
    moved = there - here
    assert ((moved - torch.tensor([20.0, 10.0])) % torch.tensor([80.0, 60.0]) == 0).all() and len(here) > 5
    points = torch.tensor([[15.0, 25.0], [42.0, 31.0]])
    arrived = matching.transfer(a, b, points)
    assert (arrived - points - torch.tensor([20.0, 10.0])).abs().max() < 5  # pixels; a patch is 10 pixels
    edges = torch.tensor([[20.0, 15.0], [45.0, 40.0]])  # between two patches
    assert (matching.transfer(a, a, edges) - edges).abs().max() < 0.1
    more = torch.cat((tokens.flatten(0, 1), tokens[0, :1] + 0.1 * tokens[1, :1]))
    more[5] += 0.3 * more[30]
    twice = features(more, (7, 7))
    _, best, mutual = matching.dense(twice, a)
    assert mutual[:48].all() and not mutual[48] and best[48] > best[5]  # high cosine, but not mutual
    assert common.centres(twice)[48].tolist() not in matching.sparse(twice, a, 1000)[0].tolist()
    with pytest.raises(InputError, match="80 x 60 pixels"):
        matching.transfer(a, b, torch.tensor([[80.0, 5.0]]))


def test_a_normalised_cut_finds_the_block_that_is_alike() -> None:
    grid, base = (8, 10), unlike(64)
    numbers = torch.zeros(grid, dtype=torch.long)
    numbers[2:5, 3:7] = 1
    tokens = base[numbers.flatten()] + 0.02 * torch.randn(80, 64)
    (found,) = discovery.discover(features(tokens, grid))
    assert torch.equal(found, numbers == 1)
    assert discovery.box_of(found, (80, 100)) == (30, 20, 70, 50)
    (mask,) = foreground.split([features(tokens, grid)])
    thing = np.zeros((80, 100), bool)
    thing[20:50, 30:70] = True
    assert (mask & thing).sum() / (mask | thing).sum() > 0.85


def test_what_reaches_the_corners_is_no_thing() -> None:
    """A ring of few patches surrounds an object of many."""
    numbers = torch.zeros(8, 10, dtype=torch.long)
    numbers[1:7, 1:9] = 1
    tokens = unlike(64)[numbers.flatten()] + 0.02 * torch.randn(80, 64)
    assert torch.equal(discovery.discover(features(tokens, (8, 10)))[0], numbers == 1)


def test_connected_regions() -> None:
    part = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]).bool()
    seed = torch.zeros_like(part)
    seed[0, 0] = True
    assert discovery.connected(seed, part).sum() == 2  # connected by a corner


def test_a_memory_bank_points_at_what_is_new() -> None:
    known = unlike(32)
    good = [features(known[torch.randperm(8)][:6], (2, 3)) for _ in range(4)]
    bank = anomaly.MemoryBank(good)
    odd = good[0].patch_tokens[0].clone()
    odd[4] = known[20]
    distances = bank.distances(features(odd, (2, 3)))
    assert distances.argmax() == 4 and distances[1, 1] == pytest.approx(1, abs=1e-5)
    assert anomaly.score(distances) == pytest.approx(1, abs=1e-5) and distances.flatten()[:4].max() < 1e-5
    assert bank.limit() < 1e-5
    others = [features(known[start : start + 6], (2, 3)) for start in (0, 6, 12)]
    assert anomaly.MemoryBank(others).limit() == pytest.approx(1, abs=1e-5)  # each image against the others
    with pytest.raises(InputError, match="got 1"):
        anomaly.MemoryBank(good[:1])


def test_labels_follow_what_moves() -> None:
    scene, frames = unlike(100).view(10, 10, 100), []
    mask = np.zeros((100, 100), np.int64)
    mask[20:50, 10:40] = 2
    for step in range(5):
        frames.append(features(scene.roll(step, 1).flatten(0, 1), (10, 10)))
    for step, labels in enumerate(tracking.track(frames, mask)):
        expected = np.roll(mask, 10 * step, axis=1)
        assert ((labels == 2) & (expected == 2)).sum() / ((labels == 2) | (expected == 2)).sum() > 0.9
    with pytest.raises(InputError, match="give a mask of the size of the image"):
        next(tracking.track(frames, mask[:50]))


def test_a_probe_can_tell_the_order_of_frames() -> None:
    code = video.time_code(5, 64)
    assert torch.cdist(code, code).add(torch.eye(5) * 99).min() > 0.5 * video.STRENGTH
    frames = 8 * unlike(64)[torch.stack([torch.randperm(16) for _ in range(40)])]  # 40 videos of 4 frames of 4 patches
    frames[:20, 1], frames[20:, 14] = 8 * unlike(64)[20], 8 * unlike(64)[20]  # an object in the first or last
    videos = (frames.unflatten(1, (4, 4)) + video.time_code(4, 64)[:, None]).flatten(1, 2)
    classes = (torch.arange(40) >= 20).long()
    assert video.train(videos[::2], classes[::2]).score(videos[1::2], classes[1::2]) > 0.9
    with pytest.raises(InputError, match="no frames"):
        video.tokens(None, [], 4, 64)


# --- in and out ------------------------------------------------------------------------------------------------------


def test_frames_come_back_as_they_were_written(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "green", "blue")]
    common.save(frames, str(tmp_path / "a.gif"))
    assert [f.getpixel((3, 3)) for f in common.read_frames(str(tmp_path / "a.gif"))] == [
        f.getpixel((3, 3)) for f in frames
    ]
    assert len(common.read_frames(str(tmp_path / "a.gif"), most=2)) == 2
    with pytest.raises(MissingFileError, match="no video and no folder"):
        common.read_frames(str(tmp_path / "b.mp4"))


def test_a_video_file_and_one_without_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="videos are read by PyAV: pip install av")
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    assert len(common.read_frames(str(tmp_path / "a.mp4"))) == 5
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no frames"):
        common.read_frames(str(tmp_path / "b.mp4"))


def test_centres_and_colours() -> None:
    places = common.centres(features(torch.zeros(6, 4), (2, 3)))
    assert places[:, 0].view(2, 3)[0].tolist() == [5, 15, 25] and places[:, 1].view(2, 3)[:, 0].tolist() == [5, 15]
    assert len(np.unique(common.colours(20), axis=0)) == 20
    labels = np.array([[0, 1], [2, 0]])
    shown = np.asarray(common.paint(Image.new("RGB", (2, 2), "black"), labels))
    assert not shown[0, 0].any() and shown[0, 1].any() and (shown[0, 1] != shown[1, 0]).any()
