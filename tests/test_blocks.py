"""The repeated blocks of models that know nothing of autotune: found, recomputed, and the same model after it."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autotune.models.blocks import find_blocks, is_checkpointed, set_checkpoint
from autotune.models.encoder import EncoderClassifier
from autotune.strategy import Checkpoint


class Block(nn.Module):
    """A residual block of somebody else's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        output: Tensor = x + scale * self.dropout(self.inner(x))
        return output


class Stage(nn.Module):
    """As in models that work at several resolutions."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.blocks(x))
        return down


class Foreign(nn.Module):
    """Two stages of two and three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(8, 2), Stage(8, 3)])
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.head(x)
        return out


def foreign() -> Foreign:
    torch.manual_seed(0)
    return Foreign()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)  # the dropout's
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def forward_calls(model: nn.Module, x: Tensor) -> Counter[int]:
    """How often each block's inside was computed in a forward and a backward pass."""
    calls: Counter[int] = Counter()
    handles = [
        block.get_submodule("inner").register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
        for index, block in enumerate(find_blocks(model))
    ]
    gradients(model, x)
    for handle in handles:
        handle.remove()
    return calls


def test_blocks_are_what_is_repeated_most_not_the_stages_around_them() -> None:
    blocks = find_blocks(foreign())
    assert [type(block) for block in blocks] == [Block] * 5
    assert len(find_blocks(EncoderClassifier(num_layers=3))) == 3
    assert len(find_blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 4, enable_nested_tensor=False))) == 4


def test_sequences_in_a_list_are_blocks() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    model.append(nn.Identity())
    model.blocks = blocks
    assert find_blocks(model) == list(blocks)


def test_a_model_that_repeats_nothing_has_no_blocks() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_blocks(plain) == []
    assert set_checkpoint(plain, "every_block") == 0


@pytest.mark.parametrize("granularity", get_args(Checkpoint))
def test_the_named_blocks_and_no_others_are_computed_twice(granularity: Checkpoint) -> None:
    model, x = foreign(), torch.randn(4, 8)
    expected = gradients(model, x)
    num_recomputed = set_checkpoint(model, granularity)
    calls = forward_calls(model, x)
    assert calls == {index: 2 if is_checkpointed(index, granularity) else 1 for index in range(5)}
    assert num_recomputed == sum(count - 1 for count in calls.values())
    torch.testing.assert_close(gradients(model, x), expected)


def test_selective_computes_activations_again_and_no_matrix_product() -> None:
    class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.calls: Counter[str] = Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    def counted(granularity: Checkpoint) -> Counter[str]:
        model, x = foreign(), torch.randn(4, 8)
        set_checkpoint(model, granularity)
        with Counts() as counts:
            gradients(model, x)
        calls: Counter[str] = counts.calls
        return calls

    plain, selective, every = counted("none"), counted("selective"), counted("every_block")
    assert selective["addmm"] == plain["addmm"] < every["addmm"]
    assert selective["gelu"] == every["gelu"] == 2 * plain["gelu"] == 10


def test_it_can_be_changed_and_taken_back() -> None:
    model, x = foreign(), torch.randn(4, 8)
    set_checkpoint(model, "every_block")
    set_checkpoint(model, "every_block")
    set_checkpoint(model, "every_4th")
    assert set(forward_calls(model, x).items()) == {(0, 2), (1, 1), (2, 1), (3, 1), (4, 2)}
    set_checkpoint(model, "none")
    assert all(type(block) is Block for block in find_blocks(model))


def test_evaluation_recomputes_nothing() -> None:
    model, x = foreign().eval(), torch.randn(4, 8)
    set_checkpoint(model, "every_block")
    assert set(forward_calls(model, x).values()) == {1}


def test_the_model_stays_the_users_own() -> None:
    model = foreign()
    keys = list(model.state_dict())
    set_checkpoint(model, "every_block")
    assert list(model.state_dict()) == keys
    assert all(isinstance(block, Block) for block in find_blocks(model))
    assert repr(model) == repr(foreign())
    x = torch.randn(4, 8)
    model.eval()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert all(type(block) is Block for block in find_blocks(twin))
        torch.testing.assert_close(twin(x), model(x))


def test_keyword_arguments_reach_a_recomputed_block() -> None:
    block = nn.ModuleList([Block(4), Block(4)])
    set_checkpoint(block, "every_block")
    x = torch.randn(2, 4)
    torch.testing.assert_close(block[0](x, scale=0.0), x)


def test_a_compiled_model_recomputes_as_well() -> None:
    model, x = foreign(), torch.randn(4, 8)
    for block in find_blocks(model):
        block.dropout = nn.Identity()
    expected = gradients(model, x)
    set_checkpoint(model, "every_2nd")
    model.compile(backend="aot_eager")
    torch.testing.assert_close(gradients(model, x), expected)
