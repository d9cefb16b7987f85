"""Linear layers whose matrix products run in 8-bit floating point (Micikevicius et al. 2022), by torchao: weights stay
as they are, every product's inputs are scaled and rounded to e4m3, its gradients to e5m2."""

from __future__ import annotations

from torch import nn

from autotune.errors import AutotuneError

MULTIPLE = 16
"""Layers whose sides are multiples of this can be computed so (torch._scaled_mm)."""


def use_fp8(model: nn.Module, *, is_emulated: bool = False) -> int:
    """Replaces the model's linear layers by torchao's, parameters and state dict keys unchanged; how many there were.

    ``is_emulated`` rounds as the hardware does and computes without it. Raises AutotuneError where there is none.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, _: str) -> bool:
        return (
            isinstance(module, nn.Linear) and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
        )

    num_layers = sum(fits(module, name) for name, module in model.named_modules() if module is not model)
    if not num_layers:
        raise AutotuneError(
            f"precision=fp8 needs linear layers inside the model whose sides are multiples of {MULTIPLE}, "
            f"{type(model).__name__} has none; set precision to bf16 in the profile"
        )
    config = Float8LinearConfig(emulate=is_emulated, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=fits, config=config)
    return num_layers
