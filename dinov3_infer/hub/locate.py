"""Locates weights: a path, the package, the cache, the hub, or a link, in this order.

Cached files are used without contacting the hub, so that a cached model starts at once, works offline and never
changes; `hf download org/name` fetches updates.  `revision=` takes a branch, a tag or a commit.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from ..checkpoints.reading import (
    CONFIG,
    INDEX,
    PICKLED,
    PROCESSOR,
    SUFFIXES,
    WEIGHTS,
    holds_weights,
    open_checkpoint,
    read_index,
)
from ..checkpoints.refusals import refuse_id
from ..errors import CheckpointError, Dinov3Error, InputError, InputTypeError, ModelNotFoundError
from ..system import sha256
from ..web import client_error, is_link, queries_cut, reach, without_query
from ..zoo import MODELS, ModelInfo, find, row_of_repository
from .answers import HubOptions, explain, not_cached

__all__ = ["HubOptions", "locate", "locate_file"]

log = logging.getLogger("dinov3_infer")

EMBEDDED = Path(__file__).parent.parent / "data"  # weights inside the package, one folder per model


def locate(
    name: str | os.PathLike[str], options: HubOptions, weights: str | os.PathLike[str] | None = None
) -> tuple[Path, ModelInfo | None]:
    """Locate the weights of a model, and download them if needed.

    Args:
        name: A name of the zoo, a hub id, a path or a link.  A text that can only be a path is returned as a path, even
            if nothing is there; a name of the zoo is a path if weights are there.
        options: Options for the hub.
        weights: A path or link of the weights, if not the default of `name`; a file named like that of another model is
            refused.

    Returns: The path of the weights, and the model of the zoo if `name` names one.

    Raises:
        ModelNotFoundError: No model has this name.
        GatedModelError: The hub refuses access.
        OfflineError: The weights are not cached, and the hub cannot be reached.
        InputError: A link is not valid.
        CheckpointError: A downloaded file is no checkpoint, or belongs to another model.
        InputTypeError: `name` is no text and no path.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise InputTypeError(f"a model is a name of list_models(), a hub id, a path or a link; got {name!r}")
    path, text = Path(os.path.expanduser(name)), os.fspath(name)
    if weights is not None:
        asked = find(text)  # finds a typo before gigabytes are downloaded
        path = locate_file(weights, options)
        named = _row_of_file(path.stem) or asked
        if named is not asked:
            raise CheckpointError(f"'{path}' has the name of {named.name}'s file; give that name, or rename the file")
        return path, asked
    if is_link(name):
        page = _of_hub(text)
        if page is None or page[2] is not None:
            return locate_file(name, options), row_of_repository(page[0]) if page else None
        text, options = page[0], replace(options, revision=page[1] or options.revision)
    elif _only_a_path(name) or path.suffix in SUFFIXES or (path.exists() and not _is_named_like_a_model(text, path)):
        return path, None
    _refuse_half_a_link(text)
    bare = text.removeprefix("hf-hub:").removeprefix("hf_hub:")
    try:
        info = find(text)
    except ModelNotFoundError:
        refuse_id(bare)
        if text.count("/") != 1:
            raise
        info = None
    if info is None:
        return _repository(bare, options, None), None
    repository = info.hub_id or info.timm_id
    organisation, _, model = bare.rpartition("/")
    if model.startswith("vit_") and info.timm_id is not None:  # the name is timm's, so use timm's copy
        home = organisation if organisation not in ("", "timm") else info.timm_id.rpartition("/")[0]
        repository = f"{home}/{model}" if "." in model else info.timm_id
    if repository is None:
        return _in_the_package(info), info
    if repository == info.hub_id and info.timm_id and _cached_weights(repository, options) is None:
        repository = info.timm_id if _cached_weights(info.timm_id, options) else repository  # the same weights
    return _repository(repository, options, info), info


def _in_the_package(info: ModelInfo) -> Path:
    folder = EMBEDDED / info.name
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"this version holds no weights of {info.name!r}; name another model, such as 'vits16', or use random "
            f"weights with Backbone.from_config({info.name!r})"
        )
    return folder


def _is_named_like_a_model(text: str, path: Path) -> bool:
    """Whether a file or folder, such as an output folder, has the name of a model but holds no weights."""
    try:
        find(text)
    except ModelNotFoundError:
        return False
    return not holds_weights(path)


def _only_a_path(name: str | os.PathLike[str]) -> bool:
    return not isinstance(name, str) or Path(name).is_absolute() or name.startswith((".", "~"))


def _refuse_half_a_link(text: str) -> None:
    """Raises InputError for a text with a query, so that no later error shows a signature."""
    if "?" in text and not os.path.exists(text):
        raise InputError(
            f"'{text.partition('?')[0]}?...' is no path and no name; give a link that begins with https://"
        )


def locate_file(weights: str | os.PathLike[str], options: HubOptions) -> Path:
    """Path of a file or folder given as a path or a link; a path is returned unchanged.

    Raises: As in `locate`.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise InputTypeError(f"weights are a path or a link, got {type(weights).__name__}")
    if not is_link(weights):
        _refuse_half_a_link(os.fspath(weights))
        return Path(weights)
    link = os.fspath(weights)
    page = _of_hub(link)
    if page is None:
        from .download import download  # few weights come by a link

        path, is_new = download(
            link, cache_dir=options.cache_dir, not_asked=options.not_asked, check=partial(_check_file, link)
        )
        row = _row_of_file(path.stem)
        if is_new and row is not None:
            _say_licence(row, without_query(link))
        return path
    repository, revision, name = page
    options = replace(options, revision=revision or options.revision)
    info = next((row for row in MODELS.values() if repository in (row.hub_id, row.timm_id)), None)
    if name is None:
        return _repository(repository, options, info)
    get = partial(_get_one, repository, name, options)
    return _cached(repository, name, options) or _from_hub(get, repository, options, info)


def _of_hub(link: str) -> tuple[str, str | None, str | None] | None:
    """Repository, revision and file of a link to a model page or a file of the hub; None for other links."""
    from huggingface_hub import constants

    inside = without_query(link).removeprefix(constants.ENDPOINT)
    part = r"([^/]+)"
    found = re.fullmatch(rf"/{part}/{part}(?:/(?:resolve|blob|raw|tree)/{part}(?:/(.+))?)?/?", inside)
    if found is None:
        return None
    owner, name, revision, file = (None if text is None else unquote(text) for text in found.groups())
    return f"{owner}/{name}", revision, file


def _cached(repository: str, file: str, options: HubOptions) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file, cache_dir=options.folder, revision=options.revision)
    except HFValidationError as error:
        raise explain(error, repository, options) from None
    return Path(found) if isinstance(found, str) else None


def _cached_weights(repository: str, options: HubOptions) -> Path | None:
    """Folder of the cache that holds the weights with all shards; None if they are not cached."""
    for name in (WEIGHTS, INDEX, PICKLED):
        path = _cached(repository, name, options)
        shards = set(read_index(path).values()) if path is not None and name == INDEX else ()
        if path is not None and all(_cached(repository, shard, options) for shard in shards):
            return path.parent
    return _cached_by_itself(repository, options)


def _cached_by_itself(repository: str, options: HubOptions) -> Path | None:
    """Folder of the cache with the single weights file of a repository without a file of a usual name."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    home = Path(options.folder or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    revision = options.revision or "main"
    branch = home / "refs" / revision
    folder = home / "snapshots" / (branch.read_text().strip() if branch.is_file() else revision)
    for name in (WEIGHTS, INDEX, PICKLED):  # all must be known to be absent
        found = try_to_load_from_cache(repository, name, cache_dir=options.folder, revision=folder.name)
        if found is None or isinstance(found, str):
            return None
    files = [path for path in folder.iterdir() if path.suffix in SUFFIXES] if folder.is_dir() else []
    return folder if len(files) == 1 else None


def _repository(repository: str, options: HubOptions, info: ModelInfo | None) -> Path:
    """The folder of the cache with config.json and weights of a repository, downloaded if needed."""
    folder = _cached_weights(repository, options)
    if folder is None:
        return _from_hub(partial(_get_weights, repository, options), repository, options, info)
    if info is None:  # the zoo knows what these files say
        _complete(repository, replace(options, revision=folder.name))  # the commit of the weights
    return folder


def _complete(repository: str, options: HubOptions) -> None:
    """Download the configs that belong to cached weights, if possible."""
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG, PROCESSOR):
        if try_to_load_from_cache(repository, name, cache_dir=options.folder, revision=options.revision) is not None:
            continue  # cached, or known to be absent
        try:
            _from_hub(partial(_get_one, repository, name, options), repository, options, None)
        except ModelNotFoundError:
            continue
        except Dinov3Error:
            log.warning("%s: %s is not cached and cannot be downloaded; loading without it", repository, name)
            return


def _get_weights(repository: str, options: HubOptions) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(name: str) -> Path | None:
        try:
            return _get_one(repository, name, options)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    config = get(CONFIG)
    if config is not None:  # the other files from the same commit, even after a push
        options = replace(options, revision=config.parent.name)
    get(PROCESSOR)
    weights = get(WEIGHTS)
    if weights is None and (weights := get(INDEX)) is not None:
        for shard in sorted(set(read_index(weights).values())):
            _get_one(repository, shard, options)
    weights = weights or get(PICKLED)
    if weights is not None:
        return weights.parent
    listed = HfApi().list_repo_files(repository, revision=options.revision, token=options.token)
    found = [name for name in listed if Path(name).suffix in SUFFIXES]
    if len(found) == 1:
        path = _get_one(repository, found[0], options)
        return path if "/" in found[0] else path.parent
    what = "nor any other weights file; give a file with weights="
    if found:
        what = f"but {', '.join(found[:4])}; give the link of one of these with weights="
    raise ModelNotFoundError(f"'{repository}' holds no {WEIGHTS} and no {PICKLED}, {what}")


def _get_one(repository: str, name: str, options: HubOptions) -> Path:
    """Download one file into the cache.

    Raises: The errors of huggingface_hub, and OSError for weights that arrived broken.
    """
    from huggingface_hub import hf_hub_download

    is_weights = Path(name).suffix in SUFFIXES
    if is_weights and (cached := _cached(repository, name, options)) is not None:
        return cached
    path = Path(
        hf_hub_download(repository, name, revision=options.revision, token=options.token, cache_dir=options.folder)
    )
    stored = path.resolve()  # named by its SHA-256 if the file is large
    if is_weights and re.fullmatch("[0-9a-f]{64}", stored.name) and sha256(stored) != stored.name:
        path.unlink()  # old versions of huggingface_hub may append the rest of a file to a web page
        stored.unlink()
        raise OSError
    return path


def _from_hub(get: Callable[[], Path], repository: str, options: HubOptions, info: ModelInfo | None) -> Path:
    """Run `get`, a download; log the licence, and turn exceptions into errors of this package."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    if options.not_asked:
        raise not_cached(repository, options, f"was not contacted ({options.not_asked})")
    reached = False
    try:
        with queries_cut():
            reach(hf_hub_url(repository, CONFIG, revision=options.revision))
            reached = True
            path = get()
    except Dinov3Error:
        raise
    except (
        OSError,
        client_error(),
        EntryNotFoundError,
        HFValidationError,
        RuntimeError,
    ) as error:  # Runtime: from hf_xet
        copy = info.timm_id if info is not None and info.timm_id != repository else None
        raise explain(error, repository, options, copy, reached) from None
    if info is not None:
        _say_licence(info, repository)
    return path


def _check_file(link: str, path: Path) -> None:
    """Raises CheckpointError for a file that is no checkpoint, or whose SHA-256 does not fit its name."""
    shown = without_query(link)
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), shown)) from None
    stem = Path(shown).stem
    row = _row_of_file(stem)
    ends = re.search(r"-([0-9a-f]{8})$", stem)
    expected = ends[1] if row is not None and ends else ""
    found = sha256(path) if expected else ""
    if not found.startswith(expected):
        raise CheckpointError(
            f"'{shown}' is not the file of that name: its SHA-256 begins with {found[:8]}; download it again"
        )


def _row_of_file(stem: str) -> ModelInfo | None:
    return next((row for row in MODELS.values() if row.meta_file == stem), None)


def _say_licence(info: ModelInfo, source: str) -> None:
    log.warning("%s: downloaded from '%s'; the licence of these weights: %s", info.name, source, info.licence)
