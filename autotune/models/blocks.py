"""The repeated blocks of any model: found in its module tree, recomputed in the backward pass where asked.

The model stays the user's own object. A recomputed block only changes its class, to a subclass that runs its forward
under ``torch.utils.checkpoint``: parameters, state dict keys, hooks, copies and isinstance are as before.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from autotune.strategy import Checkpoint

_EVERY: dict[Checkpoint, int] = {"selective": 1, "every_4th": 4, "every_2nd": 2, "every_block": 1}
_KEPT = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
    ),
    "torch_attn": ("_varlen_attn",),
}
"""Operators whose results ``selective`` keeps, by namespace: what costs most to compute again."""


class Recomputed(nn.Module):
    """Mixed into a block's class: keeps the block's inputs only, and runs it again for the backward pass."""

    keeps_products: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's own forward gives."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        options: dict[str, Any] = {"context_fn": _keep_products} if self.keeps_products else {}
        return checkpoint(super().forward, *args, use_reentrant=False, **options, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the block's own class, which is what another process can import."""
        return _empty, (plain_class(type(self)),), self.__getstate__()  # type: ignore[no-untyped-call]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats, in order: modules of one class, with parts of their own, in lists or sequences.

    Of several such classes it is the one repeated most often among those with at least half as many parameters as the
    largest: a Swin transformer's blocks, not its four stages. Empty where nothing is repeated in that way.
    """
    groups: dict[tuple[type[nn.Module], ...], list[nn.Module]] = {}
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for child in container:
                is_list = isinstance(child, nn.ModuleList)
                is_stage = isinstance(child, nn.Sequential) and isinstance(container, nn.Sequential)
                if not is_list and not is_stage and any(True for _ in child.children()):
                    parts = map(type, child.children()) if isinstance(child, nn.Sequential) else ()
                    groups.setdefault((plain_class(type(child)), *parts), []).append(child)
    sizes = {kind: sum(p.numel() for block in blocks for p in block.parameters()) for kind, blocks in groups.items()}
    largest = max(sizes.values(), default=0)
    if not largest:
        return []
    return max((groups[kind] for kind, size in sizes.items() if 2 * size >= largest), key=len)


def set_checkpoint(model: nn.Module, granularity: Checkpoint) -> int:
    """Has the blocks that the granularity names recomputed, and no others; returns how many there are. What a model of
    Hugging Face's keeps for decoding is turned off for it."""
    if granularity in _EVERY:
        configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        for config in configs:
            # of Hugging Face's decoders: would be filled twice
            if hasattr(config, "to_dict") and getattr(config, "use_cache", False):
                config.use_cache = False
    num_recomputed = 0
    for index, block in enumerate(find_blocks(model)):
        kind = plain_class(type(block))
        if is_checkpointed(index, granularity):
            kind = _recomputed_class(kind, granularity == "selective")
            num_recomputed += 1
        if type(block) is not kind:
            block.__class__ = kind
    return num_recomputed


def is_checkpointed(block_index: int, granularity: Checkpoint) -> bool:
    """Whether a block is recomputed: with ``every_2nd`` blocks 0, 2, 4 ... are."""
    return granularity in _EVERY and block_index % _EVERY[granularity] == 0


def plain_class(kind: Any) -> Any:
    """A block's own class, recomputed or not; anything else as it is."""
    return kind.__mro__[2] if isinstance(kind, type) and Recomputed in kind.__bases__ else kind


@functools.cache
def _recomputed_class(kind: type[nn.Module], keeps_products: bool) -> type[nn.Module]:
    return type(kind.__name__, (Recomputed, kind), {"__module__": kind.__module__, "keeps_products": keeps_products})


def _empty(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _keep_products() -> Any:
    spaces = {getattr(torch.ops, namespace): names for namespace, names in _KEPT.items()}
    known = ((space, name) for space, names in spaces.items() for name in names if hasattr(space, name))
    operators = [getattr(space, name).default for space, name in known]
    return create_selective_checkpoint_contexts(operators)  # type: ignore[no-untyped-call]
