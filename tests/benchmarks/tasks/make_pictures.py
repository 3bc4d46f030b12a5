"""Makes the images of examples/README.md from photographs and drawings in the public domain or CC0.

python tests/benchmarks/tasks/make_pictures.py [NAME ...]
"""

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path

import tasks  # noqa: F401  (puts examples/ on the path)

# isort: split
import anomaly
import depth
import detection
import discovery
import foreground
import masks
import matching
import normals
import numpy as np
import retrieval
import sets
import torch
import tracking
import video
from common import colours, layer_features, paint, tied
from heads import layers_of
from models import model_of
from PIL import Image, ImageDraw, ImageOps
from tasks import maps

from dinov3_infer.tasks import nearest, overlay, sheet

OUT = Path(__file__).parents[3] / "examples" / "pictures"
WIDEST, SIZE = 960, 448  # pixels of an image, pixels that the model sees
CAT = Image.open(OUT.parent / "cat.jpg").convert("RGB")


def drawing(name: str) -> Image.Image:
    """A drawing of the Open Clip Art Library, RGBA."""
    found = next(data for path, data in sets.files(sets.DRAWINGS).items() if path.endswith(f"/{name}.png"))
    image = Image.open(io.BytesIO(found)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((480, 480))
    return image


def retrieved() -> Image.Image:
    photographs = sets.landscapes()
    bank = retrieval.embed(model_of("real", 0), photographs, 224)
    rows, values = [], []
    for query in (12, 79, 93):
        cosines, found = nearest(bank[query : query + 1], bank, 6)  # the first is the query itself
        rows.append([photographs[i] for i in found[0].tolist()])
        values.append(cosines[0, 1:])
    return retrieval.contact_sheet(rows, torch.stack(values))


def split() -> Image.Image:
    photographs = [CAT, *(sets.fetch.photographs()[name] for name in ("coffee", "astronaut"))]
    features = [model_of("real", 0).extract_features(p, size=SIZE, fit="native") for p in photographs]
    found = [foreground.split([f])[0] for f in features]
    pairs = [(p, foreground.cut_out(np.asarray(p), mask)) for p, mask in zip(photographs, found, strict=True)]
    shown = [ImageOps.fit(side, (360, 300)) for side in [p for p, _ in pairs] + [cut for _, cut in pairs]]
    return sheet(shown, columns=3)


def discovered() -> Image.Image:
    shown = sets.fetch.photographs()["astronaut"]
    things = discovery.discover(model_of("real", 0).extract_features(shown, size=SIZE, fit="native"), 2)
    for thing, colour in zip(things, colours(2), strict=True):
        ImageDraw.Draw(shown).rectangle(discovery.box_of(thing, shown.size[::-1]), outline=tuple(colour), width=5)
    return shown


def matched() -> Image.Image:
    """Points of a cat transferred to a tiger, and the nearest patch of the cat for each patch of the tiger."""
    head = drawing("tiger_graig_ryan_smith_-_01")
    tiger = Image.new("RGB", (head.width + 40, head.height + 40), "white")
    tiger.paste(head, (20, 20), head)
    a, b = layer_features(model_of("real", 0), (CAT, tiger), size=448)
    here = torch.tensor([[178.0, 115], [333, 140], [255, 235], [218, 225], [400, 20]])
    above = tied(CAT, tiger, here, matching.transfer(a, b, here))
    return sheet([above, sheet(matching.placed(a, b, [CAT, tiger]), columns=2)], columns=1)


def odd() -> Image.Image:
    brick, draw = sets.textures()[0], random.Random(3)
    places = [(draw.randint(0, 256), draw.randint(0, 256)) for _ in range(9)]
    parts = [brick.crop((x, y, x + 256, y + 256)).resize((SIZE, SIZE)) for x, y in places]
    bug = drawing("lumaca_architetto_france_01").convert("LA").convert("RGBA").resize((70, 70))
    parts[-1].paste(bug, (250, 120), bug)
    features = list(layer_features(model_of("real", 0), parts, size=SIZE))
    bank = anomaly.MemoryBank(features[:-1])
    heat = overlay(parts[-1], bank.distances(features[-1]), limits=(0, 2 * bank.limit()))
    return sheet([parts[0], parts[-1], heat.resize((SIZE, SIZE))], ["good", "to look at", "how odd it is"], columns=3)


def tracked() -> list[Image.Image]:
    pool = [(drawing(name), 0) for name in ("elefante01_architetto_fr_01", "cavallo_architetto_franc_07")]
    clip = sets.clip(random.Random(2), True, 10, 2, 240, pool)
    features = layer_features(model_of("real", 0), clip.frames, size=280)
    found = tracking.track(features, clip.labels[0])
    return [paint(frame, labels, 0.5) for frame, labels in zip(clip.frames, found, strict=True)]


def drawn(held_out: bool, number: int) -> list[sets.Scene]:
    """A fixed set of drawings, three per kind, on held-out photographs at held-out places."""
    pool = [
        thing for kind in range(len(sets.DRAWN)) for thing in [t for t in sets.drawings(False) if t[1] == kind][::9][:3]
    ]
    return sets.scenes(number, 1, held_out, count=(1, 3), sizes=(0.3, 0.6), pool=pool)


def four_layers(images: list[Image.Image], size: int = 224) -> torch.Tensor:
    bb = model_of("real", 0)
    return maps(bb, images, size, layers_of("dpt", bb.config.depth))


def detected() -> Image.Image:
    train, test = drawn(False, 240), drawn(True, 6)
    known, asked = (four_layers([s.image for s in part], 168) for part in (train, test))
    torch.manual_seed(0)
    detector = detection.train(known, [(s.boxes, s.classes) for s in train], len(sets.DRAWN))
    shown = []
    for scene, (scores, boxes, classes) in zip(test, detection.detect(detector, asked), strict=True):
        shown.append(detection.draw(scene.image, scores, boxes, classes, list(sets.DRAWN)))
    return sheet(shown, columns=3)


def cut_out() -> Image.Image:
    train, test = drawn(False, 240), drawn(True, 6)
    known, asked = (four_layers([s.image for s in part], 168) for part in (train, test))
    torch.manual_seed(0)
    truth = []
    for scene in train:
        numbers = scene.numbers[::4, ::4]
        classes = torch.cat((torch.zeros(1, dtype=torch.long), scene.classes + 1))
        truth.append((numbers == torch.arange(len(classes))[:, None, None], classes))
    head = masks.train(known, truth, len(sets.DRAWN) + 1, steps=900)
    shown = []
    for scene, found in zip(test, masks.instances(head, asked, (sets.SIDE, sets.SIDE)), strict=True):
        labels, names = masks.panoptic(*found)
        shown.append(told(scene.image, labels, names))
    return sheet(shown, columns=3)


def told(image: Image.Image, labels: torch.Tensor, names: torch.Tensor) -> Image.Image:
    """Coloured segments with their names over the grey image; the background, class 0, stays clear."""
    things = torch.cat((torch.zeros(1, dtype=torch.long), (names > 0).cumsum(0) * (names > 0)))
    shown = paint(image.convert("L"), things[labels].numpy(), 0.7)
    for number in things.unique()[1:].tolist():
        y, x = (things[labels] == number).nonzero().double().mean(dim=0).tolist()
        kind = list(sets.DRAWN)[int(names[things[1:] == number]) - 1]
        ImageDraw.Draw(shown).text(
            (x, y), kind, "white", font_size=20, anchor="mm", stroke_width=2, stroke_fill="black"
        )
    return shown


def room(draw: random.Random, side: int = 224, focal: float = 1.0) -> tuple[Image.Image, torch.Tensor]:
    """Balls on a floor before a wall, in the textures of `sets.textures`, and their depth [side, side]."""
    brick, grass, gravel = (np.array(t.convert("L"), np.float32) / 255 for t in sets.textures())
    v, u = np.mgrid[:side, :side] / side - 0.5
    turn = draw.uniform(-0.4, 0.4)
    ray = np.stack((u / focal, v / focal, np.ones_like(u)), axis=-1)  # x right, y down, z away
    across = np.array([np.cos(turn), 0, np.sin(turn)])
    back = np.array([-np.sin(turn), 0, np.cos(turn)])
    shapes = [(back, draw.uniform(4, 6), brick, (200, 120, 90)), (np.array([0, 1, 0]), 1.0, gravel, (190, 180, 160))]
    depth, shown = np.full((side, side), np.inf), np.zeros((side, side, 3))

    def put(
        far: np.ndarray, texture: np.ndarray, colour: tuple[int, ...], a: np.ndarray, b: np.ndarray, light: object
    ) -> None:
        seen = (far > 0) & (far < depth)
        grain = texture[(a * 200).astype(int) % 512, (b * 200).astype(int) % 512]
        shown[seen] = ((0.4 + 0.8 * grain) * light)[seen][:, None] * np.array(colour)
        depth[seen] = far[seen]

    for normal, distance, texture, colour in shapes:
        with np.errstate(divide="ignore", invalid="ignore"):
            far = distance / (ray @ normal)
        far = np.where(np.isfinite(far), far, -1.0)
        point = ray * far[..., None]
        put(far, texture, colour, point @ across, point[..., 1] + point @ back, np.ones_like(far))
    for _ in range(draw.randint(2, 4)):
        radius = draw.uniform(0.3, 0.7)
        middle = np.array([draw.uniform(-1.2, 1.2), 1 - radius, draw.uniform(2, 4)])
        length = (ray**2).sum(-1)
        half = ray @ middle / length
        inside = half**2 - (middle @ middle - radius**2) / length
        far = np.where(inside > 0, half - np.sqrt(np.maximum(inside, 0)), -1.0)
        normal = (ray * far[..., None] - middle) / radius
        light = 0.6 + 0.4 * (normal @ np.array([-0.5, -0.7, -0.5]))
        colour = tuple(int(c) for c in colours(12)[draw.randrange(12)])
        put(far, grass, colour, normal[..., 0], normal[..., 1], light)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8)), torch.from_numpy(depth).float()


def surfaces() -> Image.Image:
    """Depth and normals of a rendered room: truth above prediction."""
    draw = random.Random(0)
    rooms = [room(draw) for _ in range(121)]
    known, asked = (four_layers([p for p, _ in part]) for part in (rooms[:120], rooms[120:]))
    depths = torch.stack([d for _, d in rooms])
    truth, sure = normals.normals_of(depths, 1.0)
    torch.manual_seed(0)
    deep, facing = depth.train(known, depths[:120]), normals.train(known, truth[:120], sure[:120])
    with torch.no_grad():
        found, normal = deep(asked)[0], normals.at_size(facing(asked), (224, 224))[0]
    photo, limits = rooms[120][0], (-float(depths[120].max()), -float(depths[120].min()))
    heat = [overlay(photo, -d, limits=limits).resize((320, 320)) for d in (depths[120], found)]
    tints = [Image.fromarray(((n.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)) for n in (truth[120], normal)]
    tints = [tint.resize((320, 320)) for tint in tints]
    names = ["picture", "depth", "normals", "", "depth found", "normals found"]
    blank = Image.new("RGB", (320, 320), "white")
    return sheet([photo.resize((320, 320)), heat[0], tints[0], blank, heat[1], tints[1]], names, columns=3)


def happening() -> Image.Image:
    draw, bb = random.Random(0), model_of("real", 0)
    parts = [(False, i % 4) for i in range(120)] + [(True, number) for number in (0, 1, 2)]
    clips = [sets.event(draw, held_out, n, 6, pool=sets.drawings(held_out)) for held_out, n in parts]
    made = torch.stack([video.tokens(bb, clip, 6, 112) for clip in clips])
    probe = video.train(made[:120], torch.tensor([number for _, number in parts[:120]]))
    rows, captions = [], []
    for clip, chances in zip(clips[120:], probe.predict_proba(made[120:]), strict=True):
        rows += [clip[i] for i in (0, 2, 3, 5)]
        captions += [f"it {sets.EVENTS[int(chances.argmax())]}, {chances.max():.0%}", "", "", ""]
    return sheet(rows, captions, columns=4)


MADE: dict[str, Callable[[], Image.Image | list[Image.Image]]] = {
    "retrieval.jpg": retrieved, "foreground.jpg": split, "discovery.jpg": discovered, "matching.jpg": matched,
    "anomaly.jpg": odd, "tracking.gif": tracked, "detection.jpg": detected, "masks.jpg": cut_out,
    "surfaces.jpg": surfaces, "video.jpg": happening,
}  # fmt: skip


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MADE:
        made = MADE[name]()
        frames = made if isinstance(made, list) else [made]
        for frame in frames:
            frame.thumbnail((WIDEST, WIDEST))
        if name.endswith(".gif"):
            small = [frame.quantize(32, dither=Image.Dither.NONE) for frame in frames]
            small[0].save(OUT / name, save_all=True, append_images=small[1:], duration=150, loop=0, optimize=True)
        else:
            frames[0].save(OUT / name, quality=80, optimize=True)
        print(f"{name}: {(OUT / name).stat().st_size // 1024} kB", flush=True)


if __name__ == "__main__":
    main()
