"""Learning rate schedules: where they begin, how high they go, where they end."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
import torch

from autotune.schedule import NUM_RESTARTS, schedule
from autotune.workloads.base import Recipe, Schedule

RECIPE = Recipe(learning_rate=0.5, weight_decay=0.0, warmup_steps=100, clip_norm=None, global_batch=1, epochs=1)


def rates(
    kind: Schedule, total_steps: int = 1000, num_steps: int | None = None, least_rate: float = 0.0
) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RECIPE.learning_rate)
    made = schedule(optimizer, msgspec.structs.replace(RECIPE, schedule=kind, least_rate=least_rate), total_steps)
    found = []
    for _ in range(num_steps or total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("kind", [kind for kind in get_args(Schedule) if kind != "onecycle"])
def test_every_schedule_warms_up_linearly_to_the_recipes_rate(kind: Schedule) -> None:
    found = rates(kind)
    assert found[0] == pytest.approx(0.005)
    assert found[49] == pytest.approx(0.25)
    assert found[99] == pytest.approx(0.5)
    assert max(found) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_cosine_and_linear_fall_all_the_way(kind: Schedule) -> None:
    found = rates(kind)[100:]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.001
    middle = found[len(found) // 2]
    assert middle == pytest.approx(0.25, abs=0.01)
    assert (found[225] > 0.4) == (kind == "cosine")


@pytest.mark.parametrize("kind", ["cosine", "linear", "restarts"])
def test_the_rate_falls_no_further_than_it_may(kind: Schedule) -> None:
    found = rates(kind, least_rate=0.05)
    assert found[0] == pytest.approx(0.005)
    assert max(found) == pytest.approx(0.5)
    assert min(found[100:]) >= 0.05
    assert found[-1] == pytest.approx(0.05, abs=0.001)


def test_restarts_go_back_to_the_full_rate() -> None:
    found = rates("restarts")[100:]
    jumps = [place for place in range(1, len(found)) if found[place] > found[place - 1] + 0.3]
    assert len(jumps) == NUM_RESTARTS
    assert all(found[place] > 0.45 for place in jumps)


def test_one_cycle_rises_from_a_twenty_fifth_and_falls_below_where_it_began() -> None:
    found = rates("onecycle")
    assert found[0] == pytest.approx(0.5 / 25)
    assert max(found) == pytest.approx(0.5, rel=1e-3)
    assert found[-1] < found[0] / 100


@pytest.mark.parametrize("kind", get_args(Schedule))
def test_steps_beyond_the_end_keep_the_last_rate(kind: Schedule) -> None:
    found = rates(kind, total_steps=50, num_steps=60)
    assert found[50:] == [found[50]] * 10


def test_a_short_run_warms_up_for_a_tenth() -> None:
    assert rates("constant", total_steps=20)[:3] == pytest.approx([0.25, 0.5, 0.5])
