"""The best Strategy for one Device and one Workload, with its evidence, as strict TOML. Where it lies is store.py's."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Self

import msgspec
import tomli_w

from autotune.errors import AutotuneError, at_fault
from autotune.files import save
from autotune.measurement import Interval, Rates
from autotune.strategy import Strategy, choices
from autotune.units import format_bytes, parse_bytes

SCHEMA = 1
"""Raised when a profile's meaning changes; older ones are read as long as they can be."""


class ProfiledDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device that a profile was measured on."""

    fingerprint: str
    kind: str
    name: str
    architecture: str
    num_cores: int
    memory_total_bytes: int


class ProfiledWorkload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The workload that a profile was measured on."""

    name: str
    source: str
    global_batch: int
    epochs: int
    num_train: int
    num_test: int
    num_parameters: int | None = None
    """Of its model: another script of the same name has another. None in profiles from before autotune wrote it."""


class Figures(Rates, frozen=True, kw_only=True):
    """What a strategy was measured to do."""

    projected_s: float
    """The planned run: all epochs with their evaluations, warm-up and compilation counted."""
    utilisation: float | None = None
    """Model FLOP utilisation: the model's own operations a second, over those of the precision's matrix products as the
    probe measured them; None where either is not known."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why the strategy was chosen."""

    objective: str
    search: str = ""
    """Its name in the journal beside the profile, where its trials are until another search takes their place."""
    search_s: float
    num_trials: int
    versions: dict[str, str]
    speedup: Interval
    """Best over baseline, measured in turns where there were rounds."""
    num_rounds: int = 0
    """Rounds that baseline and best were timed in, in turns."""
    in_turns: tuple[float, float] | None = None
    """The speeds that baseline and best had in turns, as shares of their trials', one after the other."""
    others_cores: float = 0.0
    """CPU cores that other work had on average while the search's trials were timed."""
    warm_up_cached_s: float | None = None
    """Seconds of the best's warm-up where the compiler's cache has its work; ``best.warm_up_s`` is without, or the same
    where an earlier search had compiled it and no time was left to do it again."""
    soak_steps: int = 0
    """Steps, the longest samples' in a row first, that the best has lasted; none where the search was interrupted."""
    loss_deviation: float | None = None
    """Largest distance of the best's first losses from the fp32 baseline's on the same batches, as a share of them."""
    shares: dict[str, Interval] = {}
    """How many times longer it took with each knob's plain value, all else as in the best, where that was measured."""
    baseline_strategy: Strategy
    baseline: Figures
    best: Figures


class ProfiledChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of several settings to choose from, each the best in its own way."""

    name: str
    strategy: Strategy
    figures: Figures
    speedup: Interval
    """Over the baseline."""
    num_rounds: int = 0
    soak_steps: int = 0
    loss_deviation: float | None = None


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The file's contents."""

    schema: int
    created: str
    """ISO 8601, UTC."""
    autotune: str
    """The version that wrote it."""
    device: ProfiledDevice
    workload: ProfiledWorkload
    strategy: Strategy
    evidence: Evidence
    front: tuple[ProfiledChoice, ...] = ()
    """What a search for several aims found; ``strategy`` is the first's."""

    def pick(self, wanted: str) -> Self:
        """The profile with one of its choices in force: by its name, or by ``memory<4GiB`` the fastest that fits.

        Raises AutotuneError where there is no such choice, UsageError where ``wanted`` makes no sense.
        """
        evidence = self.evidence
        own = ProfiledChoice(name="best", strategy=self.strategy, figures=evidence.best, speedup=evidence.speedup)
        choices = self.front or (own,)
        words = ", ".join(f"{choice.name} ({format_bytes(choice.figures.peak_memory_bytes)})" for choice in choices)
        knob, is_limit, limit = wanted.partition("<")
        if is_limit and knob.strip() == "memory":
            limit_bytes = parse_bytes(limit)
            fitting = [choice for choice in choices if choice.figures.peak_memory_bytes < limit_bytes]
            if not fitting:
                raise AutotuneError(f"nothing in the profile stays below {format_bytes(limit_bytes)}; it has {words}")
            chosen = min(fitting, key=lambda choice: choice.figures.projected_s)
        else:
            named = [choice for choice in choices if choice.name == wanted]
            if not named:
                more = "" if self.front else "; autotune search --objective pareto finds several"
                raise AutotuneError(f"the profile has no choice {wanted!r}; it has {words}{more}")
            chosen = named[0]
        if chosen.strategy == self.strategy:
            return self
        evidence = msgspec.structs.replace(
            evidence,
            best=chosen.figures,
            speedup=chosen.speedup,
            num_rounds=chosen.num_rounds,
            in_turns=None,
            soak_steps=chosen.soak_steps,
            loss_deviation=chosen.loss_deviation,
            warm_up_cached_s=None,
            shares={},
        )
        return msgspec.structs.replace(self, strategy=chosen.strategy, evidence=evidence)


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises AutotuneError that names the file and the key at fault."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise AutotuneError(f"there is no profile {path}; `autotune profiles list` shows those there are") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise AutotuneError(f"profile {path} cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise AutotuneError(f"profile {path} is not TOML: {exc}") from exc
    return parse_profile(data, str(path))


def parse_profile(data: dict[str, Any], name: str) -> Profile:
    """A profile from parsed TOML; ``name`` is what errors call it."""
    schema = data.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise AutotuneError(
            f"profile {name} has schema {schema}, this autotune reads up to {SCHEMA}; upgrade autotune, or search again"
        )
    try:
        profile = msgspec.convert(data, Profile)
    except msgspec.ValidationError as exc:
        key, message = at_fault(exc)
        words = message + (choices(key.rpartition(".")[2]) if message.startswith("Invalid enum") else "")
        raise AutotuneError(f"profile {name}, at {key or 'the top level'}: {words}; mend it, or search again") from exc
    strategies = {"strategy": profile.strategy}
    strategies |= {f"front[{place}].strategy": choice.strategy for place, choice in enumerate(profile.front)}
    for key, strategy in strategies.items():
        if strategy.global_batch != profile.workload.global_batch:
            raise AutotuneError(
                f"profile {name}, at {key}: micro_batch x accumulation is {strategy.global_batch}, but "
                f"workload.global_batch is {profile.workload.global_batch}; mend it, or search again"
            )
    return profile


def format_profile(profile: Profile) -> str:
    """The profile as TOML, ending in a newline."""
    data = msgspec.to_builtins(profile)
    return "# Written by autotune search. `autotune train` reads it; so does autotune.load().\n" + tomli_w.dumps(data)


def write_profile(profile: Profile, path: Path) -> None:
    """Writes or replaces the file in one move: whoever reads meanwhile gets the old one or the new one, whole.

    Raises AutotuneError when the folder or disk does not take it; an old file is then still intact.
    """
    save(path, format_profile(profile).encode(), "profile")
