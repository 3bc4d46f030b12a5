"""Publishes a model on the hub, with a model card that states what it is, its base model and how to load it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.reading import INDEX
from ..checkpoints.saving import save_checkpoint
from ..errors import Dinov3Error, GatedModelError, InputError, OfflineError
from ..images.preprocess import Preprocess
from ..model.network import Network
from ..model.vit import VisionTransformer
from ..web import client_error, queries_cut, reason
from ..zoo import OWN, ModelInfo
from .answers import HubOptions

__all__ = ["model_card", "push"]

# Licence entries of a card's header: the hub's identifier, or "other" with name and link.
_LICENCES = {
    "Apache-2.0": "license: apache-2.0",
    "FAIR Noncommercial Research License": "license: fair-noncommercial-research-license",
    "DINOv3 License": "license: other\nlicense_name: dinov3-license\n"
    "license_link: https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
}


def model_card(model: Network, repository: str, info: ModelInfo | None, origin: Mapping[str, str] | None = None) -> str:
    """The README.md of a repository that holds `model` in the layout of transformers.

    Args:
        model: The network.
        repository: The id of the repository.
        info: The model of the zoo that the weights are, or were derived from; it gives the licence and the base model.
            Without it, and for weights trained from scratch, the card states neither.
        origin: Field -> its value and source, see `Description`.
    """
    config = model.config
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    lines = ["library_name: transformers", "pipeline_tag: image-feature-extraction", "tags:", "- dinov3_infer"]
    noun = "vision transformer" if isinstance(model, VisionTransformer) else "ConvNeXt"
    kind, licence = f"A {noun}", ""
    if info is not None:
        lines.append(f"- {info.family}")
        kind = f"A {noun} with the architecture of `{info.name}`{', derived from it' if info.derived else ''}"
        licence = (
            "\n## Licence\n\nThe weights were trained from scratch, without any released weights: their licence is\n"
            "the author's choice.\n"
        )
    if info is not None and info.licence != OWN:
        lines.append(_LICENCES[info.licence])
        licence = f"\n## Licence\n\nThe licence of the weights of `{info.name}` applies: {info.licence}.\n"
        if info.hub_id is not None:
            lines.append(f"base_model: {info.hub_id}")
            licence += f"The page of `{info.hub_id}` has its text, and its conditions for passing the weights on.\n"
    header = "\n".join(lines)
    shape = f"{model.summary()}, {parameters:,.1f} M parameters"
    if isinstance(model, VisionTransformer):
        positions = "RoPE" if model.pos_embed is None else "learned positions"
        shape = (
            f"{config.depth} blocks of width {config.embed_dim}, {config.num_heads} heads,\npatches of "
            f"{config.patch_size} pixels, {config.num_registers} registers, {positions}, {parameters:,.1f} M parameters"
        )
    facts = "".join(
        f"| {name} | {text} |\n" for name, text in (origin or {}).items() if name not in ("name", "licence")
    )
    sources = f"\n## Sources of the settings\n\n| field | value and source |\n|---|---|\n{facts}" if facts else ""
    return f"""---
{header}
---

# {repository.rpartition("/")[2]}

{kind}: {shape}.

## Use

With dinov3_infer (`pip install dinov3-infer`):

```python
from dinov3_infer import Backbone

bb = Backbone.from_pretrained("{repository}")
f = bb.extract_features("photo.jpg")
f.embedding, f.feature_map  # [1, {config.embed_dim}], [1, {config.embed_dim}, h, w]
```

With transformers:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{repository}")
model = AutoModel.from_pretrained("{repository}")
with torch.inference_mode():
    outputs = model(**processor(images=Image.open("photo.jpg"), return_tensors="pt"))
outputs.last_hidden_state[:, 0]  # class token
```
{licence}{sources}"""


def push(
    model: Network,
    repository: str,
    info: ModelInfo | None,
    preprocess: Preprocess,
    origin: Mapping[str, str] | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Weights, written by dinov3_infer",
    card: str | None = None,
) -> str:
    """Create the repository if needed, and upload weights, configs and, if there is none yet, a model card.

    Args:
        model: The network.
        repository: "name" or "org/name".
        info: The model of the zoo, for the name and licence.
        preprocess: The transform.
        origin: Field -> its value and source, for the card.
        private: Make a new repository private (default: the default of the account).
        revision: Branch to write to (default: main).
        token: A token that may write (default: the stored one).
        commit_message: Message of the commit.
        card: Text of the card, which replaces an existing card.

    Returns: The link of the commit.

    Raises:
        InputError: The id is not valid, or there is no token.
        GatedModelError: The token may not write there.
        OfflineError: The hub cannot be reached.

    Example:
        >>> push(bb, "me/my-dino", bb.info, bb.preprocess, private=True)
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    options = HubOptions(revision=revision, token=token)
    if options.not_asked:
        raise OfflineError(
            f"'{repository}' cannot be written ({options.not_asked}); write a folder with save_pretrained"
        )
    api = HfApi(token=token)
    try:
        with tempfile.TemporaryDirectory() as folder, queries_cut():
            save_checkpoint(model, folder, "hf", info, preprocess)
            repository = api.create_repo(repository, private=private, exist_ok=True).repo_id  # includes the owner
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            if card is not None or not api.file_exists(repository, "README.md", revision=revision):
                (Path(folder) / "README.md").write_text(
                    card or model_card(model, repository, info, origin), encoding="utf-8"
                )
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=[INDEX, "model-*-of-*.safetensors"],  # shards of an earlier version
            )
        return str(commit.commit_url)
    except Dinov3Error:
        raise
    except LocalTokenNotFoundError:
        raise InputError("pushing needs a token, and none is stored; log in with 'hf auth login'") from None
    except HFValidationError:
        raise InputError(f"a repository is 'name' or 'org/name'; got '{repository}'") from None
    except (OSError, client_error(), RuntimeError) as error:
        what = reason(error)
        if what in ("HTTP 401", "HTTP 403"):
            raise GatedModelError(
                f"the hub refuses to write to '{repository}' ({what}); log in with 'hf auth login' and a token that "
                "may write there"
            ) from None
        raise OfflineError(
            f"'{repository}' could not be written ({what}); try again, or write a folder with save_pretrained"
        ) from None
