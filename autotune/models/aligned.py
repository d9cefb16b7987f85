"""A model's last linear layer with outputs that are no multiple of what matrix units take, computed as if they were:
a vocabulary of 50,257. On an H200 such products in bf16 are five to six times as fast."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 1024
"""Outputs: of fewer, the product is too small to matter."""


class AlignedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies with rows of zeros appended and leaves their outputs out again: what it gives
    is part of a larger tensor."""

    multiple: ClassVar[int]
    """Of which the number of outputs is made."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """Outputs [..., out_features] of inputs [..., in_features]."""
        num_outputs = len(self.weight)
        missing = -num_outputs % self.multiple
        bias = None if self.bias is None else F.pad(self.bias, (0, missing))
        return F.linear(input, F.pad(self.weight, (0, 0, 0, missing)), bias)[..., :num_outputs]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as torch's own class, which is what a process without autotune can import."""
        return nn.Linear.__new__, (nn.Linear,), self.__getstate__()  # type: ignore[no-untyped-call]


def align_linear(model: nn.Module, multiple: int) -> int:
    """Has the model's last linear layer, where it is a large one, computed in multiples of so many outputs, and no
    other; how many that changed. Parameters and state dict keys stay as they are.

    The last one, because its output goes to the loss: in the middle of a model somebody might ask for a ``view`` of it
    that only a tensor of its own can give. A layer of a class of the user's own is left as it is.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        if issubclass(type(layer), AlignedLinear):
            layer.__class__ = nn.Linear
    last = layers[-1] if layers else None
    if type(last) is not nn.Linear or len(last.weight) < LEAST or len(last.weight) % multiple == 0:
        return 0
    last.__class__ = _aligned_class(multiple)
    return 1


@functools.cache
def _aligned_class(multiple: int) -> type[nn.Linear]:
    return type("Linear", (AlignedLinear,), {"multiple": multiple})
