"""The recipe of vectors: all settings that they depend on, stored beside them and compared before rows are added."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from types import NoneType
from typing import Any, Literal, NamedTuple, Self, get_args

from ...checkpoints.fingerprint import fingerprint
from ...errors import InputError
from ...images.decode import ImageLike
from ...images.preprocess import Preprocess
from ...images.sources import Source
from ...version import __version__
from ..extractor import Extractor
from ..result import pooled_width
from ..stream import count_of
from ..vectors import EmbedOptions
from .seals import OWN, Seal

__all__ = ["BatchPlan", "Recipe", "Record", "State", "check_asked", "checked_json", "difference", "recipe_of"]

# State of a folder of shards: the step of a run that overwrites or joins shards; "" for a run that adds missing rows.
State = Literal["", "clearing", "overwriting", "joined"]
FORMATS = (1, 2)  # versions of the record: without and with checksums and sources


@dataclass(frozen=True)
class BatchPlan:
    """Decides which images run together: a shard has `shard_size` neighbours, and a pass stays inside one shard."""

    shard_size: int | None = None  # images; None: not decided yet
    batch_size: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                object.__setattr__(self, name, count_of(name, value, 1))


@dataclass(frozen=True)
class Recipe:
    """All that the vectors of a list of images depend on."""

    version: str  # of this package
    model: str | None  # name in the model table
    fingerprint: str  # of the weights
    architecture: dict[str, Any]
    preprocess: dict[str, Any]
    decode: str
    dtype: str  # see `Extractor.arithmetic`
    kind: str
    pooling: str
    normalize: bool
    out_dtype: str
    shape: tuple[int, ...] | None  # of a row; None if rows differ in shape
    count: int | None  # images; None for a stream that has not ended
    inputs: str | None  # SHA-256 of the image names; None if an image has no name
    plan: BatchPlan
    origin: str | None = None  # where the weights came from; not compared

    def to_json(self, seal: Seal | None = None, state: str = "") -> str:
        """The text of a record, with the seal and state if given."""
        more: dict[str, Any] = {} if seal is None else asdict(seal)
        return json.dumps({"format": FORMATS[-1]} | asdict(self) | more | (dict(state=state) if state else {}))

    def planned(self, found: BatchPlan) -> Self:
        """The same recipe; what its plan leaves open is taken from `found`."""
        mine = asdict(self.plan)
        return replace(self, plan=BatchPlan(**{k: asdict(found)[k] if v is None else v for k, v in mine.items()}))

    def check_continues(self, there: "Recipe", origin: object) -> None:
        """Raises: InputError if rows of this recipe do not fit those at `origin`, whose recipe is `there`."""
        if said := self.differs(there):
            raise InputError(f"'{origin}' exists already and was made {said}; give another name, or overwrite it")

    def differs(self, there: "Recipe") -> str | None:
        """The first difference from the recipe `there`, as a clause to follow "was made", or None."""
        mine, theirs = (json.loads(replace(r, origin=None).to_json()) for r in (self.planned(there.plan), there))
        for name, value in theirs.items():
            if not _same(value, mine[name]) or (name == "inputs" and value is None):
                return difference(name, value, mine[name])
        return None

    def is_like(self, other: Self) -> bool:
        """Whether two recipes are equal except for `batch_size`, which may differ between shards, and `count`, which
        the shards of a stream do not know.
        """
        plan = replace(self.plan, batch_size=other.plan.batch_size)
        same = replace(self, plan=plan, count=other.count, origin=other.origin)
        mine, theirs = (json.loads(r.to_json()) for r in (same, other))
        return _same(mine, theirs)

    def shards(self) -> Iterator[range]:
        """Yields the range of image numbers of each shard."""
        size, count = self.plan.shard_size or 1, self.count or 0
        return (range(first, min(first + size, count)) for first in range(0, count, size))


def checked_json(recipe: Recipe, state: State) -> str:
    """The record of a folder of shards with a SHA-256 of its own text, computed with zeros in its place."""
    text = json.dumps(json.loads(recipe.to_json(state=state)) | dict(own=OWN))
    return text.replace(OWN, f"own:{hashlib.sha256(text.encode()).hexdigest()}")


def _is_whole(text: bytes, own: str | None) -> bool:
    return own is None or own == f"own:{hashlib.sha256(text.replace(own.encode(), OWN.encode())).hexdigest()}"


class Record(NamedTuple):
    """The record of a file or of a folder of shards."""

    recipe: Recipe
    seal: Seal | None = None  # None for a folder, and for an old file without checksums
    state: State = ""
    old: bool = False  # whether it was written without checksums

    @classmethod
    def from_json(cls, text: str | bytes, origin: object) -> Self:
        """Reads a record.  Raises: InputError if the text is not a record, or has another format."""
        try:
            stored = json.loads(text)
            number = stored.pop("format")
            if number not in FORMATS:
                raise InputError(
                    f"'{origin}' was written by a version of dinov3_infer with another format; use that version"
                )
            *sealed, state, own = (stored.pop(name, None) for name in ("first", "rows", "files", "state", "own"))
            if not _is_whole(text if isinstance(text, bytes) else text.encode(), own):
                raise ValueError
            stored["plan"] = BatchPlan(**stored["plan"])
            stored["shape"] = None if stored["shape"] is None else tuple(map(_whole, stored["shape"]))
            for name, kinds in _KINDS.items():
                if type(stored.get(name)) not in kinds:
                    raise TypeError(name)
            if state not in (None, *get_args(State)):
                raise ValueError
            seal = None if sealed == [None] * 3 else Seal.read(*sealed)
            return cls(Recipe(**stored), seal, state or "", number == 1)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError) and "another format" in str(error):
                raise
            raise InputError(f"the record in '{origin}' is damaged; remove it and the files beside it") from None


_KINDS: dict[str, tuple[type, ...]] = dict(
    version=(str,), model=(str, NoneType), fingerprint=(str,), architecture=(dict,), preprocess=(dict,), decode=(str,),
    dtype=(str,), kind=(str,), pooling=(str,), normalize=(bool,), out_dtype=(str,), count=(int, NoneType),
    inputs=(str, NoneType), origin=(str, NoneType),
)  # fmt: skip


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def recipe_of(extractor: Extractor, images: Source | Iterable[ImageLike], options: EmbedOptions) -> Recipe:
    """The recipe for the vectors of these images.  It takes a while, because it hashes all weights and names."""
    model, transform = extractor.network, extractor.transform(options.size, options.fit, options.levels)
    width = pooled_width(model.embed_dim, options.pooling) if options.kind == "embedding" else model.embed_dim
    info = getattr(model, "info", None)
    return Recipe(
        version=__version__,
        model=info.name if info else None,
        fingerprint=fingerprint(model.state_dict(), model.config),
        architecture=model.description(),
        preprocess={name: v for name, v in asdict(transform).items() if name != "levels" or v is not None},
        dtype=extractor.arithmetic,
        shape=row_shape(transform, options.kind, width),
        origin=getattr(model, "loaded_from", None),
        **_asked(images, options),
    )


def _asked(images: Source | Iterable[ImageLike], options: EmbedOptions) -> dict[str, Any]:
    """The fields that do not depend on the model."""
    return dict(
        decode=options.decode,
        kind=options.kind,
        pooling=options.pooling,
        normalize=options.normalize,
        out_dtype=options.out_dtype,
        count=len(images) if isinstance(images, Source) else None,
        inputs=digest(images) if isinstance(images, Source) else None,
        plan=BatchPlan(options.shard_size, options.batch_size),
    )


def check_asked(images: Source, options: EmbedOptions, there: Recipe, origin: object) -> None:
    """As `Recipe.check_continues`, before a model is loaded.  Raises: InputError."""
    replace(there, **_asked(images, options)).check_continues(there, origin)


def row_shape(transform: Preprocess, kind: str, width: int) -> tuple[int, ...] | None:
    """Shape of a row, [C], [P, C] or [C, h, w], before an image is read; None if rows differ in shape."""
    if kind == "embedding":
        return (width,)
    size = transform.size
    if transform.fit == "native" or size is None:
        return None
    h, w = (side // transform.patch_size for side in (size if isinstance(size, tuple) else (size, size)))
    return (width, h, w) if kind == "map" else (h * w, width)


def digest(source: Source) -> str | None:
    """SHA-256 of the image names, in order; None if an image is an object in memory and has no name."""
    found = hashlib.sha256()
    for i in range(len(source)):
        if (key := source.key(i)) is None:
            return None
        found.update(key.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _same(there: Any, here: Any) -> bool:
    """Equality, where None equals a field that an old version did not have."""
    if isinstance(there, dict) and isinstance(here, dict):
        return all(_same(there.get(key), here.get(key)) for key in there.keys() | here.keys())
    return bool(there == here)


def difference(name: str, there: Any, here: Any) -> str:
    """The difference of a field of two recipes, worded to follow "was made"."""
    if name in ("inputs", "count") and None in (there, here):
        return "from in-memory images or a stream, so a rerun cannot check that they are the same"
    if name == "inputs":
        return "from other images, or from the same images in another order"
    if isinstance(there, dict) and isinstance(here, dict):
        part = next(key for key in (*there, *here) if not _same(there.get(key), here.get(key)))
        name, there, here = f"{name}.{part}", there.get(part), here.get(part)
    shown = [str(v)[:16] if name == "fingerprint" else json.dumps(v) for v in (there, here)]
    return f"with {name} {shown[0]}, not {shown[1]}"
