import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autotune.backends import cpu
from autotune.data.batching import in_a_row
from autotune.models import attention, flash
from autotune.models.attention import SDPA_KERNELS, SelfAttention, attend, set_attention
from autotune.models.blocks import set_checkpoint
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import APPROXIMATE, SPARSE, Attention

LENGTHS = np.array([5, 16, 1, 9])
"""Of the packed sequences."""
ON_EVERY_CPU: tuple[Attention, ...] = ("eager", "sdpa", "sdpa_math", "sdpa_flash")


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    mask_B11T = torch.arange(12)[None, None, None, :] < torch.tensor([12, 7, 1])[:, None, None, None]
    q, k, v = (torch.randn(3, 2, 12, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    return q, k, v, mask_B11T


@pytest.mark.parametrize("backend", ON_EVERY_CPU)
def test_every_backend_computes_the_same_attention_and_gradients(backend: Attention) -> None:
    q, k, v, mask = tensors()
    expected = attend(q, k, v, mask, "eager")
    expected_grad = torch.autograd.grad(expected.square().sum(), [q, k, v])
    found = attend(q, k, v, mask, backend)
    found_grad = torch.autograd.grad(found.square().sum(), [q, k, v])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found_grad, expected_grad, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        ("sdpa_math", "_scaled_dot_product_attention_math"),
        ("sdpa_flash", "_scaled_dot_product_flash_attention_for_cpu"),
        *((other, "_scaled_dot_product_flash_attention_for_cpu") for other in cpu.same_kernel.values()),
    ],
)
def test_a_backend_runs_the_kernel_that_it_says(backend: Attention, kernel: str) -> None:
    q, k, v, mask = tensors(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(q, k, v, mask, backend)
    assert any(kernel in event.key for event in profile.key_averages())


def test_a_kernel_that_the_cpu_lacks_is_refused_not_replaced() -> None:
    q, k, v, mask = tensors(torch.float32)
    with pytest.raises(RuntimeError, match="No viable backend"):
        attend(q, k, v, mask, "sdpa_efficient")


@pytest.mark.parametrize("backend", ON_EVERY_CPU)
@pytest.mark.parametrize("is_masked", [False, True])
def test_causal_attention_is_the_same_in_every_backend_and_sees_nothing_after_itself(
    backend: Attention, is_masked: bool
) -> None:
    q, k, v, mask = tensors()
    before = torch.ones(12, 12, dtype=torch.bool).tril()
    given = mask if is_masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=before & mask if is_masked else before)
    found = attend(q, k, v, given, backend, is_causal=True)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


class Varlen:
    """What the flash-attn packages and torch offer for sequences one after another, on a CPU."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, *arguments: Any, causal: bool) -> torch.Tensor:
        assert not causal
        self.num_calls += 1
        q, k, v, bounds, bounds_of_keys, longest, longest_of_keys = arguments
        assert torch.equal(bounds, bounds_of_keys)
        assert bounds.dtype == torch.int32
        sizes = bounds.diff().tolist()
        assert longest == longest_of_keys >= max(sizes)
        parts = zip(*(x_SHK.transpose(0, 1).split(sizes, 1) for x_SHK in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1).transpose(0, 1)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Varlen]:
    """flash-attn 2 as it is where it is installed, but for the kernel: no CUDA device here."""
    kernel = Varlen()
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=kernel))
    flash.packaged.cache_clear()
    flash.native.cache_clear()
    yield kernel
    flash.packaged.cache_clear()
    flash.native.cache_clear()


@pytest.mark.parametrize("is_masked", [True, False])
def test_flash_attn_computes_the_tokens_that_count_as_any_other_does(varlen: Varlen, is_masked: bool) -> None:
    q, k, v, mask = tensors()
    counts = mask[:, 0, 0] if is_masked else torch.ones(3, 12, dtype=torch.bool)
    found = {}
    for backend in ("eager", "flash_attn"):
        out = attend(q, k, v, mask if is_masked else None, backend).transpose(1, 2)[counts]
        found[backend] = (out, *torch.autograd.grad(out.square().sum(), [q, k, v]))
    torch.testing.assert_close(found["flash_attn"], found["eager"], atol=1e-10, rtol=1e-8)
    assert varlen.num_calls == 2, "once to see that it runs"


def test_flash_attn_takes_packed_sequences_at_once(varlen: Varlen) -> None:
    model = small_encoder()
    row, where = torch.randint(1, 50, (1, 31)), in_a_row(LENGTHS, 31)
    expected = model(row, **where)
    set_attention(model, "flash_attn")
    torch.testing.assert_close(model(row, **where), expected, atol=1e-5, rtol=1e-5)
    assert varlen.num_calls == 1 + 4, "once to see that it runs, and once a layer"


def test_packed_sequences_are_recomputed_as_they_were_computed(varlen: Varlen) -> None:
    grads = []
    for granularity in ("none", "every_block"):
        model = small_encoder().train()
        set_attention(model, "flash_attn")
        set_checkpoint(model, granularity)
        row = torch.randint(1, 50, (1, 31), generator=torch.Generator().manual_seed(0))
        model(row, **in_a_row(LENGTHS, 31)).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_torchs_own_kernel_takes_packed_sequences_at_once_where_it_runs(
    varlen: Varlen, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_encoder()
    set_attention(model, "sdpa_flash")
    row, where = torch.randint(1, 50, (1, 31)), in_a_row(LENGTHS, 31)
    expected = model(row, **where)  # one by one: torch's kernel is for CUDA
    monkeypatch.setattr(attention, "native", lambda device_type, dtype: varlen)
    set_attention(model, "sdpa_flash")
    torch.testing.assert_close(model(row, **where), expected, atol=1e-5, rtol=1e-5)
    assert varlen.num_calls == 4


def test_trying_a_kernel_draws_no_random_numbers_and_works_without_gradients(varlen: Varlen) -> None:
    model = small_encoder()
    before = torch.get_rng_state()
    with torch.no_grad():
        set_attention(model, "flash_attn")
    assert torch.equal(torch.get_rng_state(), before)
    assert varlen.num_calls == 1


def test_flash_attn_that_is_not_installed_is_refused_with_what_is_missing() -> None:
    q, k, v, mask = tensors(torch.bfloat16)
    with pytest.raises(RuntimeError, match="flash_attn_interface is not installed; flash_attn is not installed"):
        attend(q, k, v, mask, "flash_attn")


def small_encoder() -> EncoderClassifier:
    torch.manual_seed(0)
    return EncoderClassifier(vocabulary_size=50, max_tokens=16, width=16, num_heads=2, ffn_width=32, dropout=0.0)


def test_the_default_encoder_has_the_parameters_it_says() -> None:
    assert sum(parameter.numel() for parameter in EncoderClassifier().parameters()) == 5_851_138


def test_padding_does_not_change_the_logits() -> None:
    model = small_encoder()
    ids = torch.randint(1, 50, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    wider = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    for backend in ON_EVERY_CPU:
        set_attention(model, backend)
        found = [module.backend for module in model.modules() if isinstance(module, SelfAttention)]
        assert found == [backend] * 4
        torch.testing.assert_close(model(ids, mask), model(*wider), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [*ON_EVERY_CPU, *SPARSE])
def test_packed_sequences_give_the_logits_of_padded_ones(backend: Attention) -> None:
    model = small_encoder()
    set_attention(model, backend)
    mask = torch.arange(16) < torch.from_numpy(LENGTHS)[:, None]
    ids = torch.randint(1, 50, (4, 16)) * mask
    row = ids[mask][None]
    for packed in (row, torch.nn.functional.pad(row, (0, 9))):
        where = in_a_row(LENGTHS, packed.shape[1])
        torch.testing.assert_close(model(packed, **where), model(ids, mask), atol=1e-5, rtol=1e-5)


def test_pinned_kernels_cover_every_pinned_setting() -> None:
    from typing import get_args

    assert {"eager", "sdpa", "flash_attn", *SDPA_KERNELS, *APPROXIMATE["attention"]} == set(get_args(Attention))
