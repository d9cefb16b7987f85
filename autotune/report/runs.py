"""What training runs are compared by, in the terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autotune.training import Epoch, Metrics
from autotune.workloads.base import Recipe

_RECIPE = [field for field in Recipe.__struct_fields__ if field not in ("global_batch", "epochs")]
"""What is compared by itself; the others are the strategy's, and what is planned."""


def quality_name(epochs: Sequence[Epoch]) -> str:
    """What tells how good a training became; nothing where only the loss does."""
    if any(epoch.test_perplexity is not None for epoch in epochs):
        return "perplexity"
    return "accuracy" if any(not math.isnan(epoch.test_accuracy) for epoch in epochs) else ""


def quality_of(epoch: Epoch) -> float:
    """The perplexity, or the share classified correctly."""
    return epoch.test_accuracy if epoch.test_perplexity is None else epoch.test_perplexity


def quality_words(epoch: Epoch) -> str:
    """The share classified correctly where samples have classes, a language model's perplexity."""
    if epoch.test_perplexity is not None:
        return f"{epoch.test_perplexity:,.2f}"
    return "–" if math.isnan(epoch.test_accuracy) else f"{epoch.test_accuracy:.2%}"


def seconds_of(metrics: Metrics, epochs: int) -> float:
    """What a run's first epochs have taken with their evaluations."""
    return sum(epoch.train_s + epoch.eval_s for epoch in metrics.epochs[:epochs])


def differences(first: Metrics, second: Metrics) -> list[str]:
    """What two runs of the same training have in common, where these have not, as far as their records say."""
    fields = {"workload": "workload", "source": "data", "num_train": "samples", "num_test": "samples to test on"}
    found = [words for field, words in fields.items() if getattr(first, field) != getattr(second, field)]
    if first.strategy.global_batch != second.strategy.global_batch:
        found.append("global batch")
    if first.strategy.is_approximate != second.strategy.is_approximate:
        found.append("approximate knobs")
    if first.recipe is not None and second.recipe is not None:
        values = ((field, getattr(first.recipe, field), getattr(second.recipe, field)) for field in _RECIPE)
        found += [f"{field} ({one} and {two})" for field, one, two in values if one != two]
    if None not in (first.num_epochs, second.num_epochs) and first.num_epochs != second.num_epochs:
        found.append("planned epochs")
    return found


def is_as_long(first: Metrics, second: Metrics) -> bool:
    """Whether an epoch of both is as much work, so that their times compare."""
    return all(getattr(first, field) == getattr(second, field) for field in ("workload", "num_train", "num_test"))
