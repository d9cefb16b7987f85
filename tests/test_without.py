"""What the user leaves out of a search."""

from __future__ import annotations

import msgspec
import pytest

from autotune.cli.changes import refuse_unknown
from autotune.errors import UsageError
from autotune.search.guess import expert_guess
from autotune.search.space import build_space
from tests import factories
from tests.scripted import CPU, Prepared


def test_what_the_user_leaves_out_is_not_searched_and_the_baseline_stays(prepared: Prepared) -> None:
    without = ("padding=buckets", "compile", "workers", "micro_batch=4", "precision=fp16")
    space = build_space(factories.hardware(), CPU, prepared[1], without=without)
    assert space.values["padding"] == ("max", "longest", "packed")
    assert space.values["compile"] == ("none",)
    assert space.values["workers"] == (0,)
    assert space.values["micro_batch"] == (1, 2, 8, 16, 32)
    assert "fp16" not in {precision for _, precision in space.pairs}
    assert space.left_out["padding=buckets"] == "as asked: --without padding=buckets"
    assert space.left_out["compile=default"] == "as asked: --without compile"
    # what needs it goes with it, and is said not to be the user's doing
    assert space.values["prefetch"] == (2,)
    assert space.left_out["compile_scope=blocks"] == "nothing compiles here"
    assert expert_guess(space, factories.hardware(), CPU).padding == "packed"
    bucketed = msgspec.structs.replace(prepared[1].baseline, padding="buckets", precision="bf16")
    guess = msgspec.structs.replace(bucketed, padding="longest")
    assert space.nearest(bucketed, guess) == guess
    with pytest.raises(UsageError, match=r"micro_batch has no such value here; there are: 1, 16, 2"):
        build_space(factories.hardware(), CPU, prepared[1], without=["micro_batch=3"])
    with pytest.raises(UsageError, match="the plain baseline has it"):
        build_space(factories.hardware(), CPU, prepared[1], without=["precision=fp32"])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("pading=max", "did you mean 'padding'"),
        ("accumulation", "no knob 'accumulation' is searched"),
        ("compile=fast", "it is one of none, default"),
        ("workers=two", "expected `int`"),
    ],
)
def test_what_cannot_be_left_out_is_refused_by_name(option: str, words: str) -> None:
    refuse_unknown(["compile", "padding=buckets", "workers=1"])
    with pytest.raises(UsageError, match=words) as refusal:
        refuse_unknown([option])
    assert option in str(refusal.value)
