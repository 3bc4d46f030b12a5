"""The vision transformer of DINO, DINOv2 and DINOv3: one class for all configs.

Source: DINOv3 paper (arXiv 2508.10104), DINOv2 (2304.07193), registers (2309.16588), DINO (2104.14294).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from ..errors import InputError, InputTypeError, UnsupportedError
from .attention import resolve_attention, triton_attention, why_not_triton
from .layers import (
    Attention,
    Block,
    LayerNorm,
    PatchEmbed,
    Residual,
    ViTConfig,
    narrowed,
    widened,
    with_gradient,
    with_masks,
)
from .network import BackboneOutput, LayerOutput, Network, resolve_layers, whole_patches, without_layers
from .packing import Packing
from .positions import resize_positions
from .rope import RopeAugmentation, RopeTable, rope_periods, rope_table

__all__ = ["ViTConfig", "VisionTransformer"]


class VisionTransformer(Network):
    """Pre-norm ViT with Meta's parameter names, except `register_tokens`, and `gate_up` and `down` of the gated FFN."""

    grad_checkpointing = False  # see `dropin.set_grad_checkpointing`

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, config.num_registers, width)) if config.num_registers else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, width)) if config.mask_token else None
        self.patch_embed = PatchEmbed(config)
        if config.position_grid is None:
            self.pos_embed = None
            self.register_buffer("rope_periods", torch.empty(config.head_dim // 4, dtype=torch.float32))
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.position_grid**2, width))
            self.register_buffer("rope_periods", None)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(width, config.norm_eps)
        self.cls_norm = LayerNorm(width, config.norm_eps) if config.prefix_norm else None
        self.local_cls_norm = LayerNorm(width, config.norm_eps) if config.local_cls_norm else None
        if not self.cls_token.is_meta:  # nothing to initialise, and trying would import 75 MB of meta kernels
            self.init_weights()

    @property
    def config(self) -> ViTConfig:
        """The config of construction with the current number of blocks, as blocks may have been deleted or added."""
        depth = len(self.blocks)
        return self._built if depth == self._built.depth else replace(self._built, depth=depth)

    @config.setter
    def config(self, config: ViTConfig) -> None:
        self._built = config

    @torch.no_grad()
    def init_weights(self, layerscale: float = 1e-5) -> None:
        """Initialise every tensor at random, as in the papers' training code.

        A model built on the meta device is complete after `to_empty` and this call.
        """
        for module in self.modules():
            if isinstance(module, (LayerNorm, nn.Conv2d)):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Residual) and module.gamma is not None:
                nn.init.constant_(module.gamma, layerscale)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=0.02)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.rope_periods is not None:
            self.rope_periods.copy_(rope_periods(self.config.head_dim, self.config.rope_base))

    def set_attention(self, implementation: str | Callable[..., Tensor]) -> None:
        """Choose the attention: "auto", "triton", "sdpa", "eager", or a function with the signature of
        `rope_attention`.

        Raises: InputError for an unknown name, UnsupportedError if "triton" cannot run.
        """
        attend = resolve_attention(implementation) if isinstance(implementation, str) else implementation
        if attend is triton_attention and (reason := self.why_not_triton()) is not None:
            raise UnsupportedError(f"attn_implementation='triton' cannot run: {reason}; use 'auto'")
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def why_not_triton(self) -> str | None:
        """Why attention cannot run as the Triton kernel here; None if it can."""
        weight = self.patch_embed.proj.weight
        return why_not_triton(weight.device, weight.dtype, self.config.head_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to`, `.half` and similar calls keep the RoPE periods in float32: rounding them would change every angle."""
        kept = self.rope_periods
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if kept is not None and self.rope_periods is not None and self.rope_periods.dtype != kept.dtype:
            self.rope_periods = kept.to(self.rope_periods.device)
        return self

    # The interface of a network, and names that other libraries expect

    def stride(self, layer: int = -1) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    def width(self, layer: int = -1) -> int:
        """C."""
        return self.config.embed_dim

    @property
    def main_weight(self) -> Tensor:
        """The weight of the patch embedding, [C, in_chans, p, p]."""
        return self.patch_embed.proj.weight

    def description(self) -> dict[str, Any]:
        """The fields of the config, and the RoPE periods."""
        periods = self.rope_periods
        return asdict(self.config) | {"rope_periods": None if periods is None else periods.tolist()}

    def summary(self) -> str:
        """The architecture in one line."""
        c = self.config
        positions = "RoPE" if c.position_grid is None else f"learned {c.position_grid}x{c.position_grid}"
        return (
            f"{c.depth} blocks of width {c.embed_dim}, patch {c.patch_size}, {c.num_registers} registers, {positions}"
        )

    @property
    def num_heads(self) -> int:
        """H."""
        return self.config.num_heads

    @property
    def num_register_tokens(self) -> int:  # type: ignore[override]
        """R."""
        return self.config.num_registers

    n_storage_tokens = num_register_tokens

    @property
    def num_prefix_tokens(self) -> int:  # type: ignore[override]
        """1 + R."""
        return self.config.num_prefix

    # The forward pass

    def forward(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px] float, normalised; sides are whole patches
        layers: int | Sequence[int] | None = None,
        masks: Tensor | None = None,  # [B, P] bool: these patches become the mask token
    ) -> BackboneOutput:
        """Compute tokens; layers pass through the final norm like the last one.  For arguments see `Network.forward`.

        Returns: cls_token [B, C], register_tokens [B, R, C], patch_tokens [B, P, C], and a tuple of layers.

        Raises: InputError, InputTypeError or LayerError, as there.
        """
        if isinstance(layers, Proxy):  # an input of a torch.fx graph
            pixels, layers = without_layers(pixels, layers), None
        indices = resolve_layers(layers, self.config.depth)
        last, taken = self.run_blocks(pixels, masks, indices)
        picked = tuple(LayerOutput(*self.split(self.normed(taken[i]))) for i in indices)
        return BackboneOutput(*self.split(self.normed(last)), picked)

    def forward_sizes(
        self, batches: Sequence[Tensor], layers: int | Sequence[int] | None = None
    ) -> list[BackboneOutput]:
        """The result of `forward` for each [B_i, 3, H_i, W_i]; one packed pass in eval mode."""
        if len(batches) == 1 or self.training:  # in training the packed pass norms later sizes differently
            return super().forward_sizes(batches, layers)
        return self.forward_packed(batches, layers=layers)

    def run_blocks(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px]
        masks: Tensor | None = None,  # [B, P] bool
        indices: Sequence[int] = (),  # blocks whose output is kept; -1 is the input of the first block
        stop_early: bool = False,  # stop after the last of `indices`
        positions: Tensor | None = None,  # [1, P, C], if already computed; see `positions`
        rope: RopeTable | None = None,  # if already computed
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The stream [B, N, C] before the final norm, after the last block and after each block of `indices`."""
        x = self.embed_tokens(pixels, masks, positions)
        rope = self.rope(self.grid_of(pixels)) if rope is None else rope
        if rope is not None:
            rope = narrowed(rope, self.main_weight, self.blocks[0].attn.attend)  # type: ignore[union-attr]
        taken = {-1: x} if -1 in indices else {}
        end = max(indices) + 1 if stop_early and indices else self.config.depth
        for i, block in enumerate(self.blocks[:end]):
            x = self._through(block, x, rope)
            if i in indices:
                taken[i] = x
        return x, taken

    def _through(self, block: nn.Module, *given: Any) -> Tensor:
        found: Tensor = (
            checkpoint(block, *given, use_reentrant=False)
            if self.grad_checkpointing and torch.is_grad_enabled()
            else block(*given)
        )
        return found

    def forward_packed(
        self,
        crops: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float, normalised: one tensor per size
        masks: Sequence[Tensor | None] | None = None,  # [B_i, P_i] bool each
        rope: RopeAugmentation | None = None,  # drawn again for every block and group of crops
        drop_path: float | Sequence[float] = 0.0,  # share of images that skip a branch; one, or one for each block
        generator: torch.Generator | None = None,  # for both random draws
        layers: int | Sequence[int] | None = None,  # as in `forward`
    ) -> list[BackboneOutput]:
        """Compute tokens of images of several sizes in one pass; attention stays within each image.

        Without `rope` and `drop_path` the result equals `forward` on each tensor.  In training mode the class and
        register tokens of all groups but the first (the local crops) use `local_cls_norm` if the model has it.

        Raises: InputError for a wrong number of crops, masks or shares, InputTypeError for a single tensor.
        """
        if isinstance(crops, Tensor):
            raise InputTypeError(
                "forward_packed takes a list, one tensor for each size; call the model itself for one tensor"
            )
        masks = masks if masks is not None else [None] * len(crops)
        if len(masks) != len(crops):
            raise InputError(
                f"forward_packed got {len(crops)} tensors and {len(masks)} masks; give one mask or None for each tensor"
            )
        if not crops:
            raise InputError("forward_packed got no crops; give at least one tensor")
        depth = self.config.depth
        shares = list(drop_path) if isinstance(drop_path, Sequence) else [drop_path] * depth
        if len(shares) != depth:
            raise InputError(f"drop_path has {len(shares)} shares for {depth} blocks; give one, or one for each block")
        if wrong := [share for share in shares if not 0.0 <= share < 1.0]:
            raise InputError(f"drop_path is a share of images, got {wrong[0]}; give 0 to below 1")
        if rope is not None and self.rope_periods is None:
            raise InputError("this model has learned positions, so there is no RoPE to augment; leave rope out")
        indices = resolve_layers(layers, depth)
        streams = [self.embed_tokens(pixels, mask) for pixels, mask in zip(crops, masks, strict=True)]
        grids = [self.grid_of(pixels) for pixels in crops]
        packing = Packing(tuple((s.shape[0], s.shape[1]) for s in streams), streams[0].device)
        x = torch.cat([s.flatten(0, 1) for s in streams])
        cu_seqlens, longest = packing.cu_seqlens(), packing.longest
        tables, joined = None, None
        taken: dict[int, list[Tensor]] = {}
        for i, block in enumerate(self.blocks):
            if self.rope_periods is not None and (tables is None or rope is not None):
                tables = [rope_table(g, self.rope_periods, self.config.num_prefix, rope, generator) for g in grids]
                attend = self.blocks[0].attn.attend  # type: ignore[union-attr]
                tables = [narrowed(table, self.main_weight, attend) for table in tables]
                joined = packing.table(tables)
            if shares[i] > 0.0:
                x = block.forward_dropped(x, tables, packing, shares[i], generator)  # type: ignore[operator]
            else:
                x = self._through(block, x, joined, cu_seqlens, longest)
            if i in indices:
                taken[i] = packing.split(x)

        def named(stream: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
            return self.split(self.normed(stream, local=self.training and group > 0))

        return [
            BackboneOutput(*named(stream, i), tuple(LayerOutput(*named(taken[layer][i], i)) for layer in indices))
            for i, stream in enumerate(packing.split(x))
        ]

    def embed_tokens(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px]
        masks: Tensor | None = None,  # [B, P] bool
        positions: Tensor | None = None,  # [1, P, C]
    ) -> Tensor:
        """Class token, registers and patches before the first block, [B, N, C]."""
        grid = self.grid_of(pixels)
        x = widened(self.patch_embed(pixels))
        x = with_masks(x, masks, self.mask_token)
        return self.with_prefix(x, grid, positions)

    def with_prefix(
        self,
        x: Tensor,  # [B, P, C] embedded patches
        grid: tuple[int, int],
        positions: Tensor | None = None,  # [1, P, C]
    ) -> Tensor:
        """Class token, registers and patches, [B, N, C], plus learned positions if the model has them."""
        prefix = self.cls_token.to(x.dtype)
        if self.mask_token is not None:
            prefix = with_gradient(prefix, self.mask_token)
        if self.pos_embed is not None:
            x = x + (self.positions(grid, x.dtype) if positions is None else positions).to(x.dtype)
            prefix = prefix + self.pos_embed[:, :1].to(x.dtype)
        if self.register_tokens is not None:
            prefix = torch.cat((prefix, self.register_tokens.to(x.dtype)), dim=1)
        return torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1)

    def positions(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Learned positions of the patches, [1, P, C], for a stream of this dtype."""
        assert self.pos_embed is not None
        working = torch.float32 if self.config.resizes_in_float32 else dtype
        return resize_positions(self.pos_embed[:, 1:], grid, self.config.position_resize, working)

    def rope(self, grid: tuple[int, int]) -> RopeTable | None:
        """cos and sin of all tokens of an image, [N, D/2] each; None with learned positions."""
        return None if self.rope_periods is None else rope_table(grid, self.rope_periods, self.config.num_prefix)

    def grid_of(self, pixels: Tensor, layer: int = -1) -> tuple[int, int]:
        """(h, w) in patches.  Raises: InputError or InputTypeError unless pixels are [B, in_chans, h*p, w*p] floats."""
        return whole_patches(pixels, self.config.patch_size, self.config.in_chans)

    def normed(self, x: Tensor, local: bool = False) -> Tensor:
        """The final norm, [B, N, C] -> [B, N, C]."""
        prefix_norm = self.local_cls_norm if local and self.local_cls_norm is not None else self.cls_norm
        if prefix_norm is None:
            return self.norm(x)  # type: ignore[no-any-return]
        prefix = self.config.num_prefix
        return torch.cat((prefix_norm(x[:, :prefix]), self.norm(x[:, prefix:])), dim=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] -> class token [B, C], registers [B, R, C], patches [B, P, C]."""
        prefix = self.config.num_prefix
        return x[:, 0], x[:, 1:prefix], x[:, prefix:]
