"""What a search found, and the profile that it becomes."""

from __future__ import annotations

import datetime

import msgspec

from autotune import __version__
from autotune.backends.base import Device
from autotune.flops import Flops
from autotune.measurement import Interval, Rates, Trial
from autotune.pace import slowdown
from autotune.profile import SCHEMA, Evidence, Figures, Profile, ProfiledChoice, ProfiledDevice, ProfiledWorkload
from autotune.search.explain import Share
from autotune.search.objective import Objective, PlannedRun
from autotune.search.proof import Proof
from autotune.strategy import Precision
from autotune.workloads.base import Workload


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One of several settings to choose from."""

    name: str
    trial: Trial
    speedup: Interval
    """Over the baseline."""
    num_rounds: int
    proof: Proof | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found."""

    baseline: Trial
    best: Trial
    speedup: Interval
    planned: PlannedRun
    objective: Objective
    search: str
    """Its name in the journal."""
    trials: tuple[Trial, ...]
    search_s: float
    warm_up_cached_s: float | None
    """Seconds of the best's warm-up where the compiler finds its work in the cache, as training does; None where
    nothing is compiled, or such a start was not measured."""
    num_rounds: int
    """Rounds in which baseline and best were timed in turns; at none, the interval is from their trials alone."""
    proof: Proof | None
    """The best's last test; None where the search was interrupted before it, and for the plain baseline."""
    was_interrupted: bool
    shares: tuple[Share, ...] = ()
    """What each knob of the best brings, the largest first; those too that brought nothing and were set back."""
    front: tuple[Choice, ...] = ()
    """What was found for each aim, where there are several; the best is the first."""
    is_settled: bool = False
    """Whether the trials ended because no other was expected to save more than it takes."""
    lacked_time: bool = False
    """Whether the budget had no time for what was to be timed in turns last."""
    flops: Flops = Flops(None, "not counted")
    """What training a sample takes by the model's own arithmetic."""
    matmul_flops: dict[Precision, float] = {}
    """The device's rate of matrix products, by precision, as far as the probe measured it."""

    def utilisation(self, trial: Trial) -> float | None:
        """Model FLOP utilisation of a finished trial; None where what it takes is not known."""
        rate = self.matmul_flops.get(trial.strategy.precision)
        if self.flops.per_sample is None or rate is None or trial.measurement is None:
            return None
        return trial.measurement.samples_per_s * self.flops.per_sample / rate

    @property
    def others_cores(self) -> float:
        """CPU cores that other work had on average while trials were timed."""
        timed = [(trial.others_cores, trial.wall_s) for trial in self.trials if trial.others_cores is not None]
        total_s = sum(wall_s for _, wall_s in timed)
        return sum(cores * wall_s for cores, wall_s in timed) / total_s if total_s else 0.0

    def in_turns(self) -> tuple[float, float] | None:
        """The speeds that baseline and best had in turns, as shares of their trials', had the device been as fast then.
        None where they were not timed in turns, or one was never tried alone."""
        alone = {trial.number: trial for trial in self.trials}

        def share(raced: Trial) -> float | None:
            tried = alone.get(raced.number)
            if tried is None or tried.measurement is None or raced.measurement is None:
                return None
            then = tried.measurement.samples_per_s * slowdown(tried, raced.pulse_s)
            return raced.measurement.samples_per_s / then

        if not self.num_rounds or self.best.number == self.baseline.number:
            return None
        base, best = share(self.baseline), share(self.best)
        return None if base is None or best is None else (round(base, 4), round(best, 4))


def profile_of(result: Result, device: Device, workload: Workload) -> Profile:
    """The profile that a search's result becomes."""
    return Profile(
        schema=SCHEMA,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        autotune=__version__,
        device=ProfiledDevice(
            fingerprint=device.fingerprint,
            kind=device.kind,
            name=device.name,
            architecture=device.architecture,
            num_cores=device.num_cores,
            memory_total_bytes=device.memory_total_bytes,
        ),
        workload=ProfiledWorkload(
            name=workload.name,
            source=workload.source,
            global_batch=workload.recipe.global_batch,
            epochs=result.planned.epochs,
            num_train=result.planned.num_train,
            num_test=result.planned.num_test,
            num_parameters=workload.num_parameters,
        ),
        strategy=result.best.strategy,
        front=tuple(
            ProfiledChoice(
                name=choice.name,
                strategy=choice.trial.strategy,
                figures=figures(choice.trial, result),
                speedup=choice.speedup,
                num_rounds=choice.num_rounds,
                soak_steps=choice.proof.soak_steps if choice.proof else 0,
                loss_deviation=choice.proof.loss_deviation if choice.proof else None,
            )
            for choice in result.front
        ),
        evidence=Evidence(
            objective=result.objective,
            search=result.search,
            search_s=round(result.search_s, 1),
            num_trials=len(result.trials),
            versions=device.versions,
            speedup=result.speedup,
            num_rounds=result.num_rounds,
            in_turns=result.in_turns(),
            others_cores=round(result.others_cores, 2),
            warm_up_cached_s=result.warm_up_cached_s,
            soak_steps=result.proof.soak_steps if result.proof else 0,
            loss_deviation=result.proof.loss_deviation if result.proof else None,
            baseline_strategy=result.baseline.strategy,
            shares={share.knob: share.ratio for share in result.shares if share.ratio and share.num_rounds},
            baseline=figures(result.baseline, result),
            best=figures(result.best, result),
        ),
    )


def figures(trial: Trial, result: Result) -> Figures:
    """A finished trial's figures, with the planned run's projection. The trial must have a measurement."""
    assert trial.measurement is not None
    return Figures(
        **{name: getattr(trial.measurement, name) for name in Rates.__struct_fields__},
        projected_s=result.planned.projected_s(trial.measurement),
        utilisation=result.utilisation(trial),
    )
