"""Parts at the level of the model: inference with and without the kernel, a training step, and real weights.

All models of a cell have the same random weights, and are judged by ours in float32.
"""

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from measure import Cell, imported, relative_error
from operators import Plan
from peers import OP
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from dinov3_infer import Backbone
from dinov3_infer.checkpoints.config_json import hf_config
from dinov3_infer.cli.bench.contest import Settings
from dinov3_infer.cli.bench.contestants import timm_model
from dinov3_infer.zoo import ARCHITECTURES

S, B, L, H, G = "dinov3_vits16", "dinov3_vitb16", "dinov3_vitl16", "dinov3_vith16plus", "dinov3_vit7b16"
# model, pixels, images: the most important first; one image shows the cost of launches
INFERENCE = (
    (L, 224, 128), (L, 224, 1), (L, 512, 32), (S, 224, 256), (S, 1024, 16), (S, 224, 1), (B, 224, 128), (B, 224, 1),
    (G, 224, 32), (H, 224, 64), (L, 1024, 8), (S, 512, 64), (B, 512, 32), (B, 1024, 8), (H, 512, 16), (G, 512, 8),
    (S, 2048, 2), (L, 2048, 2), (B, 2048, 2), (H, 1024, 4), (G, 1024, 2),
)  # fmt: skip
# model, sizes: images of each side in pixels
TRAINING = ((L, {256: 64}), (B, {256: 64}), (B, {256: 32, 112: 128}), (B, {512: 16}))
REHEARSAL = ((S, 32, 2), (S, 32, 1))
INFERENCE_LIMIT, TRAINING_LIMIT = 5e-2, 2e-1  # relative errors of all tokens and of a gradient, in bfloat16


def attend_fused(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The kernel, whatever the length; on a CPU its definition."""
    longest = max_seqlen if max_seqlen is not None else qkv.shape[1]
    return OP.rope_attention(qkv, cos, sin, cu_seqlens, longest, qkv.shape[-1] ** -0.5)[0]  # type: ignore[no-any-return]


OURS: dict[str, str | Callable[..., Tensor]] = {"ours": "auto", "ours, fused": attend_fused, "ours, sdpa": "sdpa"}


def twin(model: nn.Module, share: bool = True) -> Any:
    """A copy of a model, with the same parameters if `share`."""
    tensors = (*model.parameters(), *model.buffers()) if share else ()
    return copy.deepcopy(model, {id(t): t for t in tensors})


@lru_cache(maxsize=1)
def built(name: str, settings: Settings, dtype: torch.dtype, timm: bool = True) -> dict[str, nn.Module]:
    """Our model and those of the peers that can be imported, with the same weights."""
    found: dict[str, nn.Module] = {}
    config, stored = ARCHITECTURES[name], hf_config(ARCHITECTURES[name])
    if (transformer := imported("transformers", "DINOv3ViTModel")) is not None:
        stated = transformer.config_class(**stored, attn_implementation="sdpa")
        with torch.device(settings.device):
            peer = transformer(stated)
        found["transformers"] = peer.to(settings.device, dtype).eval()
        ours = Backbone.adopt(found["transformers"])
    else:
        with torch.device(settings.device):
            ours = Backbone.from_config(config)
            ours.init_weights(layerscale=1.0)
        ours = ours.to(settings.device, dtype)
    if timm and imported("timm", "create_model") is not None:
        with tempfile.TemporaryDirectory() as folder:
            found["timm"] = timm_model(ours.save_pretrained(Path(folder) / name, layout="timm"), settings.device).to(
                dtype
            )
    return found | {"ours": ours}


def compiled(model: nn.Module, settings: Settings, mode: str | None = None) -> Callable[..., Any]:
    """For exactly these shapes.  A rehearsal compiles no code."""
    if not settings.cuda:
        return torch.compile(model, dynamic=False, backend="eager")
    return torch.compile(model, dynamic=False, mode=mode)


def all_tokens(output: Any) -> Tensor:
    """[B, N, C], from whatever a model returns."""
    if hasattr(output, "patch_tokens"):
        return torch.cat((output.cls_token[:, None], output.register_tokens, output.patch_tokens), dim=1)
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output  # type: ignore[no-any-return]


def flops_of(name: str, tokens: int) -> float:
    """Linears and attention of one image."""
    c = ARCHITECTURES[name]
    linears = 2 * tokens * (4 * c.embed_dim**2 + (3 if c.gated else 2) * c.embed_dim * c.ffn_dim)
    return float(c.depth * (linears + 4 * tokens**2 * c.embed_dim) + 2 * tokens * 3 * c.patch_size**2 * c.embed_dim)


# --- inference -----------------------------------------------------------------------------------------------------


def inference_part(settings: Settings) -> list[Plan]:
    plans: list[Plan] = []
    for name, size, batch in INFERENCE if settings.cuda else REHEARSAL:
        what = dict(model=name, pixels=size, batch=batch, dtype="bfloat16")
        plans.append((what, partial(_inference_cell, name, size, batch, settings)))
    return plans


def _graphed(model: nn.Module, settings: Settings) -> Callable[[Tensor], Any]:
    """One CUDA graph, and a tensor that its input is copied to, as in a server."""
    if not settings.cuda:
        return model
    state: dict[str, Any] = {}

    def run(pixels: Tensor) -> Any:
        if not state:
            state["pixels"], side = pixels.clone(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model(state["pixels"])
            torch.cuda.current_stream().wait_stream(side)
            state["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(state["graph"]):
                state["output"] = model(state["pixels"])
        state["pixels"].copy_(pixels)
        state["graph"].replay()
        return state["output"]

    return run


def _inference_cell(name: str, size: int, batch: int, settings: Settings) -> Cell:
    models = built(name, settings, torch.bfloat16)
    inputs = [torch.randn(batch, 3, size, size, device=settings.device, dtype=torch.bfloat16) for _ in range(2)]
    ours = {label: twin(models["ours"]) for label in OURS}
    for label, attention in OURS.items():
        ours[label].set_attention(attention)
    with torch.no_grad():
        single = twin(models["ours"], share=False).float()
        single.set_attention("sdpa")
        exact = all_tokens(single(inputs[0][:1].float())).double()
        del single
    peers = {label: models[label] for label in ("transformers", "timm") if label in models}
    calls: dict[str, Callable[..., Any]] = ours | peers
    calls |= {
        f"{label}, compiled": compiled(model, settings) for label, model in {**peers, "ours": ours["ours"]}.items()
    }
    if batch == 1:
        calls["ours, CUDA graph"] = _graphed(ours["ours"], settings)
        for label, model in peers.items():
            calls[f"{label}, reduce-overhead"] = compiled(model, settings, "reduce-overhead")

    def forward(call: Callable[..., Any], pixels: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return call(pixels)

    def judge(output: Any) -> float:
        tokens = all_tokens(output)
        return relative_error(tokens[:1], exact) if bool(tokens.isfinite().all()) else float("inf")

    what = dict(model=name, pixels=size, batch=batch, dtype="bfloat16")
    found = {label: partial(forward, call) for label, call in calls.items()}
    flops = batch * flops_of(name, exact.shape[1])
    return Cell(what, inputs, found, judge, INFERENCE_LIMIT, flops, replay=False)


# --- training ------------------------------------------------------------------------------------------------------


def training_part(settings: Settings) -> list[Plan]:
    plans: list[Plan] = []
    for name, sizes in TRAINING if settings.cuda else (("nano", {32: 2}), ("nano", {32: 2, 16: 2})):
        what = dict(model=name, images=" + ".join(f"{n} x {side} px" for side, n in sizes.items()))
        plans.append((what, partial(_training_cell, what, sizes, settings)))
    return plans


def _training_cell(what: dict[str, Any], sizes: dict[int, int], settings: Settings) -> Cell:
    """Forward, mean square distance to noise, backward, AdamW: bfloat16 arithmetic over float32 weights.

    The learning rate is 0, so that all steps are equal.  A contestant returns the gradient of its patch embedding.
    Memory is counted beyond the weights and the state of the optimiser.
    """
    built.cache_clear()  # the models of the other part leave the memory
    models = built(what["model"], settings, torch.float32, timm=False)
    batches = [
        [torch.randn(count, 3, side, side, device=settings.device) for side, count in sizes.items()] for _ in range(2)
    ]
    with torch.no_grad():
        shapes = [all_tokens(models["ours"](pixels[:1])).shape[1:] for pixels in batches[0]]
    targets = [torch.randn(len(p), *shape, device=settings.device) for p, shape in zip(batches[0], shapes, strict=True)]

    def stepper(model: nn.Module, forward: Callable[[list[Tensor]], list[Any]], autocast: bool = True) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=settings.cuda)
        (kernel,) = (m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
        arithmetic = torch.autocast(settings.device.type, torch.bfloat16) if autocast else nullcontext()

        def step(pixels: list[Tensor]) -> Tensor:
            with arithmetic:
                outputs = forward(pixels)
            distances = zip(outputs, targets, strict=True)
            loss = torch.stack([(all_tokens(out).float() - aim).square().mean() for out, aim in distances]).sum()
            loss.backward()
            found = kernel.grad.clone()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return found

        return step

    def each(model: Callable[..., Any]) -> Callable[[list[Tensor]], list[Any]]:
        return lambda pixels: [model(p) for p in pixels]

    def mine(attention: str | Callable[..., Tensor], packed: bool = False, autocast: bool = True) -> Any:
        model = twin(models["ours"], share=False)
        model.set_attention(attention)
        return stepper(model, model.forward_packed if packed else each(model), autocast)

    exact = mine("sdpa", autocast=False)(batches[0]).double()
    calls: dict[str, Callable[..., Any]] = {}
    if len(sizes) > 1:
        calls |= {f"{label}, packed": mine(attention, packed=True) for label, attention in OURS.items()}
    calls |= {label: mine(attention) for label, attention in OURS.items() if len(sizes) == 1 or label == "ours"}
    if "transformers" in models:
        peer = models["transformers"]
        calls["transformers"] = stepper(peer, each(peer))
        if len(sizes) == 1:
            other = twin(peer, share=False)
            calls["transformers, compiled"] = stepper(other, each(compiled(other, settings)))
    state = 12 * sum(p.numel() for p in models["ours"].parameters()) / 2**20
    notes = {"weights_and_state_mib": round(state, 1)}
    images = zip(sizes.values(), shapes, strict=True)
    flops = 3.0 * sum(count * flops_of(what["model"], shape[0]) for count, shape in images)
    judge = partial(relative_error, reference=exact)
    return Cell(what, batches, calls, judge, TRAINING_LIMIT, flops, replay=False, notes=notes)


# --- real weights --------------------------------------------------------------------------------------------------


@torch.no_grad()
def agreement(weights: str, images: list[Path], settings: Settings) -> list[dict[str, Any]]:
    """Least cosine of class and patch tokens between float32 on the CPU and this device, for each way to run."""
    judge, found = Backbone.from_pretrained(weights, device="cpu"), []
    large = 32 * judge.patch_size if settings.cuda else 128
    for dtype in ("auto", "bfloat16", "float32") if settings.cuda else ("float32",):
        model = Backbone.from_pretrained(weights, device=settings.device, dtype=dtype)
        for attention in OURS:
            model.set_attention(OURS[attention])
            for size in (224, large):
                ours, theirs = model.extract_features(images, size=size), judge.extract_features(images, size=size)
                found.append(dict(dtype=dtype, attention=attention, pixels=size) | _cosines(ours, theirs))
            together = list(model.iter_features(images, size=large, fit="native"))  # packed where sizes differ
            alone = [judge.extract_features(image, size=large, fit="native") for image in images]
            each = [_cosines(ours, theirs) for ours, theirs in zip(together, alone, strict=True)]
            worst = {key: min(row[key] for row in each) for key in each[0]}
            found.append(dict(dtype=dtype, attention=attention, pixels="packed") | worst)
    return found


def _cosines(ours: Any, theirs: Any) -> dict[str, float]:
    return {
        name: float(cosine_similarity(getattr(ours, name).float().cpu(), getattr(theirs, name), dim=-1).min())
        for name in ("cls_token", "patch_tokens")
    }
