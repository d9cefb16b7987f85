"""The device's own speed while something is timed, and times moved to one speed.

A shared machine gets slower and faster by a tenth within seconds: a figure is worth little without the speed it was
taken at. That is told by beats, the seconds that a fixed piece of work takes (trial/pulse.py): several a second, for
which what is timed is paused, or else one before and one after.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from autotune.measurement import Lap, Measurement, Trial

AWAY_S = 3.0
"""Nothing beats for so long, but on a machine where a step's time says nothing any more."""
_NEXT_BEAT_S = 1.0
WINDOW_S = 2.0
"""A single beat is known to a tenth: the speed in a shorter lap is told from the beats of so many seconds."""


class Follows(NamedTuple):
    """How training's seconds go with the beats'."""

    power: float
    doubt: float
    """Give or take: a standard deviation of the power."""


WITHIN = Follows(0.8, 0.1)
"""Of a trial, with beats taken while it was timed (docs/LOG.md 2026-11-23)."""
LAP_POWER = 0.5
"""Of a lap beside other laps: it has a few beats only, and what they say is noise for a good part."""
AROUND = Follows(0.75, 0.4)
"""One before and one after (docs/LOG.md 2026-11-22)."""


class Beat(NamedTuple):
    """One of those that are taken while something is paused. Seconds of ``time.perf_counter``, which all processes of
    a Linux machine share."""

    start_s: float
    end_s: float
    seconds: float
    """Of the fixed work."""


_RECORD = struct.Struct("=3d")


def written(beat: Beat) -> bytes:
    """As ``Beats`` reads it."""
    return _RECORD.pack(*beat)


class Beats:
    """The beats of a file that another process writes; none where there is no file."""

    def __init__(self, path: str | None = None) -> None:
        self._path = Path(path) if path else None
        self._num_read = 0
        self._beats: list[Beat] = []
        self._has_ended = False
        """Whether the next beat was once waited for in vain."""

    def during(self, start_s: float, end_s: float) -> tuple[float, float | None]:
        """Seconds paused from one time to another, the present, and the beats' mean then, or in ``WINDOW_S`` until
        then; None without any. Times must not go back from call to call.
        """
        since_s = min(start_s, end_s - WINDOW_S)
        self._read()
        waits_until_s = time.perf_counter() + _NEXT_BEAT_S
        while self._lacks_beats(start_s, end_s) and not self._has_ended:
            if time.perf_counter() > waits_until_s:
                self._has_ended = True
                break
            time.sleep(_NEXT_BEAT_S / 10)  # the next is on its way
            self._read()
        before = [beat for beat in self._beats if beat.end_s <= since_s]
        self._beats = before[-1:] + self._beats[len(before) :]
        until = [beat for beat in self._beats if beat.start_s < end_s and beat.end_s > since_s]
        paused_s = sum(max(0.0, min(beat.end_s, end_s) - max(beat.start_s, start_s)) for beat in until)
        told = [beat.seconds for beat in until if beat.seconds < AWAY_S]
        return paused_s, statistics.geometric_mean(told) if told else None

    def stopped(self, start_s: float, end_s: float) -> bool:
        """Whether all was stopped from one time to another, of which ``during`` has told: a container was paused, a
        machine slept. There were no beats then, and are again."""
        return any(
            min(following.start_s, end_s) - max(one.end_s, start_s) > AWAY_S
            for one, following in itertools.pairwise(self._beats)
        )

    def _lacks_beats(self, start_s: float, end_s: float) -> bool:
        return bool(self._beats) and end_s - max(start_s, self._beats[-1].end_s) > AWAY_S

    def _read(self) -> None:
        found = list(self._new())
        self._beats += found
        self._has_ended = self._has_ended and not found

    def _new(self) -> Iterator[Beat]:
        found = b""
        if self._path is not None:
            with contextlib.suppress(OSError), self._path.open("rb") as file:  # gone with the process that wrote it
                file.seek(self._num_read)
                found = file.read()
        whole = len(found) - len(found) % _RECORD.size
        self._num_read += whole
        return map(Beat._make, _RECORD.iter_unpack(found[:whole]))


def usual_pulse_s(laps: Iterable[Lap]) -> float | None:
    """The mean of what the laps know of the device's speed; one that took twice as long had twice as many beats."""
    found = [(math.log(lap.pulse_s), lap.seconds) for lap in laps if lap.pulse_s]
    return math.exp(statistics.fmean(*zip(*found, strict=True))) if found else None


def at_pulse(lap: Lap, usual_s: float | None, pulse_s: float | None) -> Lap:
    """The lap as it would have been at another speed; as it was where it has none. ``usual_s`` is the mean of its
    process's laps: all their beats together are worth more than those of one."""
    if not (lap.pulse_s and usual_s and pulse_s):
        return lap
    slower = lap_slowdown(lap.pulse_s, usual_s) * (usual_s / pulse_s) ** WITHIN.power
    return msgspec.structs.replace(lap, seconds=lap.seconds / slower, wait_s=lap.wait_s / slower, pulse_s=pulse_s)


def even(laps: Sequence[Lap]) -> list[Lap]:
    """One process's laps as they would have been had the device been as fast in each as it was on the whole."""
    pulse_s = usual_pulse_s(laps)
    return [at_pulse(lap, pulse_s, pulse_s) for lap in laps]


def lap_slowdown(pulse_s: float | None, than_s: float | None) -> float:
    """How many times slower training was in one lap than in another, by their beats; 1 where either has none."""
    return (pulse_s / than_s) ** LAP_POWER if pulse_s and than_s else 1.0


def measured_at(measurement: Measurement, pulse_s: float | None) -> Measurement:
    """A process's figures as they would have been at another speed; as they were where either is not known."""
    if not measurement.pulse_s or not pulse_s:
        return measurement
    slower = (measurement.pulse_s / pulse_s) ** WITHIN.power
    return msgspec.structs.replace(sped_up(measurement, slower), pulse_s=pulse_s)


def sped_up(measurement: Measurement, slower: float) -> Measurement:
    """The figures as they would have been where the device had not been so many times slower."""
    return msgspec.structs.replace(
        measurement,
        samples_per_s=measurement.samples_per_s * slower,
        tokens_per_s=measurement.tokens_per_s * slower,
        eval_samples_per_s=measurement.eval_samples_per_s * slower,
        step_ms=measurement.step_ms / slower,
        warm_up_s=measurement.warm_up_s / slower,
        epoch_s=tuple(seconds / slower for seconds in measurement.epoch_s),
    )


def slowdown(trial: Trial, than_s: float | None) -> float:
    """How many times slower training was in a trial than it is at another pulse; 1 where either is not known."""
    return (trial.pulse_s / than_s) ** _follows(trial).power if trial.pulse_s and than_s else 1.0


def with_beats_around(trial: Trial, before_s: float | None, after_s: float | None) -> Trial:
    """A trial that had no beats of its own, with those before and after it."""
    if trial.has_beats or not before_s or not after_s:
        return trial
    return msgspec.structs.replace(trial, pulse_s=math.sqrt(before_s * after_s))


def drift_doubt(trial: Trial, than_s: float | None) -> float:
    """How wrong that may be: a relative standard deviation."""
    return _follows(trial).doubt * abs(math.log(trial.pulse_s / than_s)) if trial.pulse_s and than_s else 0.0


def _follows(trial: Trial) -> Follows:
    return WITHIN if trial.has_beats else AROUND
