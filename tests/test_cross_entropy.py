"""The loss of many classes in half precision, computed in parts: the same loss and gradients, less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.models import cross_entropy
from autotune.workloads.base import CrossEntropy


class LargestInFp32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest fp32 tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dtype is torch.float32:
            self.elements = max(self.elements, found.numel())
        return found


@pytest.fixture
def in_parts_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PART_BYTES", 3 * 4 * 100)


def loss_and_gradient(logits: Tensor, targets: Tensor, scale: float = 0.25) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    loss = CrossEntropy()(logits, targets)
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert loss.dtype is torch.float32
    return loss.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(10, 100), (2, 5, 100), (1, 1, 100)])
@pytest.mark.usefixtures("in_parts_of_three_rows")
def test_loss_and_gradients_are_those_of_the_whole(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits, targets = (4 * torch.randn(shape)).to(dtype), torch.randint(0, 100, shape[:-1])
    targets.view(-1)[0] = -100  # one that does not count
    if targets.numel() > 1:
        targets.view(-1)[-1] = 99
    found = loss_and_gradient(logits, targets)
    monkeypatch.setattr(cross_entropy, "PART_BYTES", 2**40)
    whole = loss_and_gradient(logits, targets)
    torch.testing.assert_close(found[0], whole[0])
    torch.testing.assert_close(found[1], whole[1], rtol=2**-7, atol=1e-6)


@pytest.mark.usefixtures("in_parts_of_three_rows")
def test_no_fp32_tensor_is_larger_than_a_part() -> None:
    logits, targets = torch.randn(50, 100, dtype=torch.bfloat16), torch.arange(50)
    with LargestInFp32() as seen:  # type: ignore[no-untyped-call]
        loss_and_gradient(logits, targets)
    assert seen.elements == 300
    with LargestInFp32() as seen:  # type: ignore[no-untyped-call]
        loss_and_gradient(logits.float(), targets)
    assert seen.elements == 5000, "in fp32 nothing changes"


@pytest.mark.usefixtures("in_parts_of_three_rows")
def test_logits_of_a_padded_layer_are_taken_as_they_lie() -> None:
    torch.manual_seed(0)
    padded, targets = torch.randn(2, 5, 128, dtype=torch.bfloat16), torch.randint(0, 100, (2, 5))
    leaf = padded.clone().requires_grad_()
    loss = CrossEntropy()(leaf[..., :100], targets)
    (gradient,) = torch.autograd.grad(loss, leaf)
    own = loss_and_gradient(padded[..., :100].contiguous(), targets, scale=1.0)
    torch.testing.assert_close(loss.detach(), own[0])
    torch.testing.assert_close(gradient[..., :100], own[1])
    assert not gradient[..., 100:].any()


@pytest.mark.usefixtures("in_parts_of_three_rows")
def test_targets_of_any_integer_type_do() -> None:
    logits, targets = torch.randn(10, 100, dtype=torch.bfloat16), torch.arange(10)
    found = loss_and_gradient(logits, targets.to(torch.uint8))
    torch.testing.assert_close(found, loss_and_gradient(logits, targets))


@pytest.mark.usefixtures("in_parts_of_three_rows")
def test_smoothed_labels_take_the_whole() -> None:
    logits, targets = torch.randn(10, 100, dtype=torch.bfloat16), torch.arange(10)
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(CrossEntropy(0.1)(logits, targets), expected)
