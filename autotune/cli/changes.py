"""NAME=VALUE on the command line: fields of the recipe, and knobs of the setting, that the user sets by hand."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar, get_args, get_type_hints

import msgspec

from autotune.errors import UsageError, at_fault, nearest
from autotune.strategy import Strategy, choices

if TYPE_CHECKING:
    from autotune.workloads.base import Recipe, Workload

T = TypeVar("T", "Recipe", Strategy)

_FIXED = {
    "epochs": "; use --epochs",
    "global_batch": ": the profile is searched for it; name the workload with it, as in --model imdb@64",
    "deterministic": "; use --deterministic",
}
"""What is not changed so, and what does."""


def changed_recipe(recipe: Recipe, changes: Collection[str]) -> Recipe:
    """The recipe with some fields changed. Raises UsageError for what it has not, or cannot be."""
    return _changed(recipe, "recipe", _parsed(recipe, "recipe", changes))


def changed_strategy(strategy: Strategy, changes: Collection[str]) -> Strategy:
    """The setting with some knobs changed, and as many micro batches as the global batch then takes. Raises UsageError
    for what it has not, or cannot be."""
    values = _parsed(strategy, "knob", changes)
    found = _changed(strategy, "knob", values)
    for knob, other in (("micro_batch", "accumulation"), ("accumulation", "micro_batch")):
        size = getattr(found, knob)
        if knob in values and other not in values and strategy.global_batch % size == 0:
            return msgspec.structs.replace(found, **{other: strategy.global_batch // size})
    if found.global_batch != strategy.global_batch:
        raise UsageError(
            f"--knob: micro_batch x accumulation is {found.micro_batch} x {found.accumulation}, and the global batch "
            f"{strategy.global_batch}; give a micro_batch that divides it, and no accumulation"
        )
    return found


def refuse_unknown(without: Collection[str]) -> None:
    """Raises UsageError for what is no knob that is searched, or no value of it."""
    known = [name for name in Strategy.__struct_fields__ if name not in (*_FIXED, "accumulation", "window")]
    for option in without:
        knob, mark, value = option.partition("=")
        if knob not in known:
            raise UsageError(f"--without {option}: no knob {knob!r} is searched{nearest(knob, known)}")
        if mark:
            _changed(Strategy(micro_batch=1), "without", {knob: value})


def refuse_idle(strategy: Strategy, changes: Collection[str], workload: Workload) -> None:
    """Raises UsageError where a change of a knob does nothing in the setting that came of it, or to the model."""
    idle = dict(strategy.idle)
    if strategy.memory_format != "contiguous" and not workload.has_convolutions:
        idle["memory_format"] = "the model has no convolutions"
    for change in changes:
        if (reason := idle.get(change.partition("=")[0])) is not None:
            raise UsageError(f"--knob {change} does nothing here: {reason}")


def trained_otherwise(strategy: Strategy, workload: Workload) -> Iterator[str]:
    """In words, what of a setting trains something else than the plain baseline does, as far as a search would know."""
    if strategy.accumulation > 1 and (reason := workload.split_refusal):
        yield f"micro_batch={strategy.micro_batch} trains something else than the whole batch does: {reason}"
    if strategy.checkpoint not in ("none", "memory_budget") and (reason := workload.recompute_refusal):
        yield f"checkpoint={strategy.checkpoint} trains something else: {reason}"
    if strategy.padding in ("longest", "buckets") and (reason := workload.trim_refusal):
        yield f"padding={strategy.padding} trains something else: {reason}"


def _parsed(what: Recipe | Strategy, option: str, changes: Collection[str]) -> dict[str, str | None]:
    known = [name for name in what.__struct_fields__ if name not in _FIXED]
    values: dict[str, str | None] = {}
    for change in changes:
        name, mark, value = change.partition("=")
        if not mark:
            raise UsageError(f"--{option} {change}: NAME=VALUE is wanted")
        if name not in known:
            hint = _FIXED.get(name) or nearest(name, known)
            raise UsageError(f"--{option} {change}: there is no {name!r} to change{hint}")
        values[name] = value
    return values


def _changed(what: T, option: str, values: Mapping[str, str | None]) -> T:
    hints = get_type_hints(type(what))
    # "none" is no number for a field that may have none, and a value as any other for one of names
    found = {
        name: None if value == "none" and type(None) in get_args(hints[name]) else value
        for name, value in values.items()
    }
    try:
        return msgspec.convert({**msgspec.to_builtins(what), **found}, type(what), strict=False)
    except msgspec.ValidationError as exc:
        name, message = at_fault(exc)
        given = f" {name}={values[name]}" if name in values else ""
        raise UsageError(f"--{option}{given}: {message[0].lower()}{message[1:]}{choices(name, type(what))}") from exc
