"""Options for huggingface_hub, and its exceptions as errors of this package."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import Dinov3Error, GatedModelError, InputError, ModelNotFoundError, OfflineError
from ..web import reason

__all__ = ["HubOptions", "explain", "not_cached"]


@dataclass(frozen=True)
class HubOptions:
    """Options for huggingface_hub, whose environment variables are respected too.

    Args:
        revision: Branch, tag or commit.
        token: A token, True for the stored one, False for none, None for the default of huggingface_hub.
        cache_dir: Folder of the cache (default: that of huggingface_hub).
        local_files_only: Never contact the hub.

    Raises: InputError for an empty token or one with white space.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.token, str) and (not self.token or re.search(r"\s", self.token)):
            raise InputError("token is empty or contains white space; give the token alone, or None for the stored one")

    @property
    def folder(self) -> Path:
        """Folder of the cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE if self.cache_dir is None else self.cache_dir).expanduser()

    @property
    def not_asked(self) -> str | None:
        """Why the hub must not be contacted; None if it may be."""
        from huggingface_hub import constants

        if self.local_files_only:
            return "local_files_only=True"
        return "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else None

    @property
    def sends_token(self) -> bool:
        """Whether requests carry a token."""
        from huggingface_hub import constants, get_token

        if self.token is None or self.token is True:
            unasked = self.token is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
            return get_token() is not None and not unasked
        return self.token is not False


def explain(
    error: Exception, repository: str, options: HubOptions, copy: str | None = None, reached: bool = True
) -> Dinov3Error:
    """Turn an exception of huggingface_hub into an error of this package, which the caller raises.

    Args:
        error: The exception.
        repository: The repository that was requested.
        options: The options of the request.
        copy: Another repository with the same weights.
        reached: The hub had answered before.
    """
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error  # its HEAD request failed
    cause = cause or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.LocalTokenNotFoundError):
        return InputError("token=True needs a stored token, and none is stored; log in with 'hf auth login'")
    if isinstance(cause, errors.HFValidationError):
        return ModelNotFoundError(f"'{repository}' is no existing path and no hub id; a hub id has the form 'org/name'")
    sent = options.sends_token
    if isinstance(cause, errors.GatedRepoError):
        state = "the token that was sent has no access" if sent else "no token was sent"
        other = f", or use timm's copy under the same licence, {copy!r}" if copy else ""
        return GatedModelError(
            f"access to '{repository}' is gated, and {state}: accept the licence on its page and log in with "
            f"'hf auth login', or pass weights=PATH with a file that you already have{other}"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"'{repository}' has no revision {options.revision!r}; give one of its branches, tags or commits"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"'{repository}' is no existing path, and the hub shows no model of that name"
            f"{' with the token that was sent' if sent else ' (no token was sent)'}; check the id, or log in with "
            "'hf auth login'"
        )
    if isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError):
        return ModelNotFoundError(f"'{repository}' has no such file; see the list on its page")
    if status == 401:
        return ModelNotFoundError(
            f"the hub refused the token for '{repository}' (HTTP 401); log in again with 'hf auth login', or pass "
            "token=False for a public model"
        )
    if status == 403:
        return GatedModelError(
            f"the hub refused access to '{repository}' (HTTP 403); log in with 'hf auth login', and give a "
            "fine-grained token the permission to read gated repositories"
        )
    if isinstance(cause, errors.FileMetadataError):
        return OfflineError(
            f"the server that answered for '{repository}' is no hub, but perhaps a login page or a proxy; open the hub "
            "in a browser, check HF_ENDPOINT, or give weights=PATH"
        )
    if not reached:
        return not_cached(repository, options, f"cannot be reached ({reason(cause)})")
    broken = type(cause) in (OSError, RuntimeError) and not getattr(cause, "errno", None)
    what = "a file arrived incomplete" if broken else reason(cause)
    how = "; if that does not help, set HF_HUB_DISABLE_XET=1" if type(cause) is RuntimeError else ""
    return OfflineError(f"download of '{repository}' failed ({what}); try again, or give weights=PATH{how}")


def not_cached(repository: str, options: HubOptions, why: str) -> OfflineError:
    """The error for weights that are not cached and cannot be downloaded; `why` completes "the hub ..."."""
    at = f" --revision {options.revision}" if options.revision else ""
    return OfflineError(
        f"'{repository}' is no existing path and not in the cache '{options.folder}', and the hub {why}; run "
        f"'hf download {repository}{at}' where the hub can be reached, copy the cache, or give weights=PATH"
    )
