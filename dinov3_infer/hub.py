"""Where weights come from: a path, else the cache, else the hub."""

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import GatedModelError, InputTypeError, ModelNotFoundError, OfflineError
from .files import CONFIG, INDEX, PICKLED, PROCESSOR, SUFFIXES, WEIGHTS, read_index
from .zoo import ModelInfo, find

__all__ = ["HubOptions", "locate"]


@dataclass(frozen=True)
class HubOptions:
    """What huggingface_hub needs to know; its own environment variables count too."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False


def locate(name: str | os.PathLike[str], options: HubOptions) -> tuple[Path, ModelInfo | None]:
    """The path of a model's weights, and its row of the zoo if it was called by a name.

    What can only be a path is returned as one, there or not.

    Raises: ModelNotFoundError, GatedModelError, OfflineError; InputTypeError for what is neither name nor path.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise InputTypeError(f"a model is a name of list_models(), a hub id or a path; got {name!r}")
    path, text = Path(name).expanduser(), os.fspath(name)
    only_a_path = not isinstance(name, str) or path.is_absolute() or text.startswith((".", "~"))
    if only_a_path or path.suffix in SUFFIXES or path.exists():
        return path, None
    try:
        info = find(text)
    except ModelNotFoundError:
        if text.count("/") != 1:
            raise
        return _download(text, options, None), None
    repository = info.hub_id or info.timm_id
    organisation, _, model = text.removeprefix("hf-hub:").removeprefix("hf_hub:").rpartition("/")
    if model.startswith("vit_") and info.timm_id is not None:  # timm was named, so timm's copy it is
        home = organisation if organisation not in ("", "timm") else info.timm_id.rpartition("/")[0]
        repository = f"{home}/{model}" if "." in model else info.timm_id
    if repository is None:
        raise ModelNotFoundError(
            f"no weights of {info.name!r} are published yet; Backbone.from_config({info.name!r}) gives random ones"
        )
    return _download(repository, options, info), info


def _download(repository: str, options: HubOptions, info: ModelInfo | None) -> Path:
    """config.json and the weights of a repository, as a folder of the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(file: str) -> Path | None:
        try:
            return Path(
                hf_hub_download(
                    repository,
                    file,
                    revision=options.revision,
                    token=options.token,
                    cache_dir=None if options.cache_dir is None else os.fspath(options.cache_dir),
                    local_files_only=options.local_files_only,
                )
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    try:
        fetch(CONFIG)
        fetch(PROCESSOR)
        weights = fetch(WEIGHTS)
        if weights is None and (weights := fetch(INDEX)) is not None:
            for shard in sorted(set(read_index(weights).values())):
                fetch(shard)
        if weights is None:
            weights = fetch(PICKLED)
    except GatedRepoError:
        raise GatedModelError(_gated_message(repository, info)) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        at = f" at revision {options.revision!r}" if options.revision else ""
        raise ModelNotFoundError(
            f"the hub has no model '{repository}'{at} that you can see; check the id, or log in with 'hf auth login'"
        ) from None
    except LocalEntryNotFoundError:
        raise OfflineError(
            f"'{repository}' is no path here and not in the cache, and the hub cannot be reached; "
            f"run 'hf download {repository}' where it can, copy the cache, or give weights=PATH"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP {status}" if status else type(error).__name__
        raise OfflineError(f"download of '{repository}' failed ({reason}); try again, or give weights=PATH") from None
    if weights is None:
        raise ModelNotFoundError(f"'{repository}' holds no model.safetensors; give the file itself with weights=PATH")
    return weights.parent


def _gated_message(repository: str, info: ModelInfo | None) -> str:
    timm = (
        f", or take timm's copy under the same licence, {info.timm_id!r}" if info is not None and info.timm_id else ""
    )
    return (
        f"access to '{repository}' is gated: accept the licence on its page and log in with 'hf auth login', "
        f"or pass weights=PATH to a file that you already have{timm}"
    )
