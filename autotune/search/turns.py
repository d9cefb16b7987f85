"""The finalists and the baseline timed in turns, so that the machine's drift hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from autotune import backends
from autotune.backends.cpu import usable_cores
from autotune.contention import Load
from autotune.laps import Epoch, epoch_seconds, uncompiled
from autotune.measurement import Lap, Measurement, Trial
from autotune.pace import at_pulse, measured_at, usual_pulse_s
from autotune.search.finals import Final, ratio
from autotune.stats import MIN_RANKED
from autotune.trial.pulse import Pulse
from autotune.trial.runner import Session, TrialEndedError
from autotune.trial.worker import Command, Done, Job

EVAL_BATCHES = 2
"""Evaluation batches of each of the first rounds."""
EVAL_ROUNDS = 3
WAIT_S = 2.0
"""Where rounds are shorter than this, one that others disturb is left unfinished, and begun again when they leave the
cores alone or so much has passed. Each wait in vain doubles the rounds that are finished before the next."""
LOOK_S = 0.1
"""The cores' accounting goes by hundredths of a second: shorter looks see nothing or all."""
MIN_QUIET = 5
"""With so many quiet rounds the disturbed ones do not count. Which they are is told by the cores, not by the times."""
MAX_LAPS = 2
"""Laps of one turn at most: consecutive ones cover the lengths. Where processes live on, the slowest takes one."""
TURN_S = 5.0
"""A turn whose process is alone, which pays for its start, takes as many laps as fit into this."""
COMPILED_LAPS = 3
"""So many more steps do compiled settings take before the clock runs, to meet more shapes."""
LONGEST = 2
"""The longest batch, on which a process warms up, takes as long as about so many usual ones where not all are padded
alike: on imdb 512 tokens, of which buckets have 280 on average."""
CACHED_SHARE = 0.5
"""At most this share of its warm-up does a compiled setting take where the compiler's cache has it: 0.48, 0.20 and 0.14
of imdb's, lm's and cifar10's on an H100 (docs/LOG.md 2026-11-27)."""
MIN_ROUNDS, MAX_ROUNDS = 3, 200
PROCESSES, LIFE_S = 12, 2.0
"""Where processes are replaced, each entrant gets about so many in a race, or more where they would race for longer
than this; two rounds each at least. They are clusters enough for an interval, with some to spare for those that were
disturbed all along."""
ALONE_S = 0.3
"""Where steps of a host's entrants take so long, every turn has a process of its own: what the others' hold of the
memory, idle though they are, can make page faults twice as dear, and a setting whose allocator gives memory back half
as slow again (docs/LOG.md 2026-11-26). With shorter ones there would be more starting than timing."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, less their whole part, never come close to one another (Weyl 1916): every life starts at other
batches."""
NARROW = 0.02
"""A race may end when every ratio's 95 % interval reaches no further than this to either side."""


class Entrant(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that enters the race."""

    trial: Trial
    job: Job
    silence_s: float = math.inf
    """Its process hangs if it says nothing for so long."""
    compiles: bool = False
    """Whether its process compiles something before it is fast."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of each entrant that is still in the race."""

    laps: dict[int, tuple[Lap, ...]]
    """By the trial's number."""
    life: int
    """Which of its processes an entrant ran it in: the first, the second, ..."""
    is_quiet: bool
    """Whether other work left the cores alone."""


class Race:
    """Times all entrants in turns (A B C, C B A, ...), each in its own process. What is done so far can be read at any
    time; an entrant that fails is left out, as its rivals go on.

    Two processes of one setting differ by some percent for as long as they live, by where their memory came to lie. So
    processes are replaced after some rounds, which the interval takes as a cluster, where enough such lives fit into
    the time; else every process lives through the race. Where steps are long (``is_alone``), each turn's process is a
    fresh one and the only one.

    A turn that takes longer than ``timeout_s`` fails; ``memory_limit_bytes`` holds for each process alone. Turns that
    are long enough for beats of a ``pulse`` are moved to one speed of the device by them.
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        *,
        timeout_s: float,
        memory_limit_bytes: int,
        pulse: Pulse | None = None,
    ) -> None:
        self._running = list(entrants)
        self._pulse = pulse
        self._timeout_s, self._memory_limit_bytes = timeout_s, memory_limit_bytes
        self._sessions: dict[int, Session] = {}
        self._measurements: dict[int, list[Measurement]] = {entrant.trial.number: [] for entrant in entrants}
        """The latest of each of an entrant's processes."""
        self._epochs: dict[int, Epoch] = {}
        self._rounds: list[Round] = []
        self._num_cores = usable_cores()
        self._num_lives = 0
        self._life_s = math.inf
        """How long processes live before they are replaced."""
        self._is_alone = False
        """Whether each turn's process is a fresh one and the only one."""
        self._closed_cpu_s = 0.0
        """What the processes that are gone have spent."""
        self.failures: dict[int, TrialEndedError] = {}
        """Why an entrant is no longer in the race, by its trial's number."""

    def run(
        self, *, enough_s: float, max_rounds: int | None = None, on_round: Callable[[int], None] = lambda _: None
    ) -> None:
        """Races until every ratio to the first entrant is known, or ``enough_s`` or ``max_rounds`` are spent.

        Never ends before ``MIN_ROUNDS``, but where fewer than two entrants are left. The rule looks at the intervals'
        width only: one that also waited for a verdict would find one in noise.
        """
        start = time.monotonic()
        round_s = math.inf
        patient_until, patience = 0, 1
        max_rounds = MAX_ROUNDS if max_rounds is None else max_rounds
        try:
            self._open()
            born = time.monotonic()
            opening_s = born - start
            while len(self._running) > 1 or self.num_rounds == 0:
                began = time.monotonic()
                if not self._round(gives_up=round_s <= WAIT_S and self.num_rounds >= patient_until):
                    if not self._await_quiet():
                        patience *= 2
                        patient_until = self.num_rounds + patience
                    began = time.monotonic()
                    self._round(gives_up=False)
                on_round(self.num_rounds)
                now = time.monotonic()
                round_s = min(round_s, now - began)
                is_out = self.num_rounds >= max_rounds or 2 * now - began - start > enough_s
                if not self._running or (self.num_rounds >= MIN_ROUNDS and (is_out or self._is_known())):
                    return
                if self.num_rounds == 2 and not self._is_alone:  # A B, B A: both came first once
                    is_cheap = not any(entrant.compiles for entrant in self._running)
                    if is_cheap and min(enough_s / (opening_s + 2 * round_s), max_rounds / 2) >= MIN_RANKED:
                        self._life_s = max(0.0, min(enough_s / PROCESSES - opening_s, LIFE_S))
                if self.num_rounds % 2 == 0 and now - born >= self._life_s:
                    self._open()
                    born = time.monotonic()
        finally:
            self._close_all()

    @property
    def num_rounds(self) -> int:
        """Rounds that all entrants have finished."""
        return len(self._rounds)

    @property
    def num_disturbed(self) -> int:
        """Rounds left out because other work kept the cores busy in them."""
        num_quiet = sum(found.is_quiet for found in self._rounds)
        return self.num_rounds - num_quiet if num_quiet >= MIN_QUIET else 0

    def finals(self) -> list[Final]:
        """What the entrants that are still in the race have shown in the rounds that all of them finished."""
        counted = [found for found in self._rounds if found.is_quiet or not self.num_disturbed]
        pulse_s = usual_pulse_s(lap for found in counted for laps in found.laps.values() for lap in laps)
        were_replaced = self._is_alone or math.isfinite(self._life_s)
        lives = tuple(found.life for found in counted) if were_replaced else None
        finals: list[Final] = []
        for entrant in self._running if counted else ():
            number = entrant.trial.number
            usual_s = {
                life: usual_pulse_s(lap for found in counted if found.life == life for lap in found.laps[number])
                for life in {found.life for found in counted}
            }
            rounds = [[at_pulse(lap, usual_s[found.life], pulse_s) for lap in found.laps[number]] for found in counted]
            epoch_s = tuple(epoch_seconds(rounds, self._epochs[number]))
            final = Final(
                trial=entrant.trial,
                measurement=_middle(
                    [measured_at(found, pulse_s) for found in self._measurements[number]], entrant.trial.measurement
                ),
                epoch_s=epoch_s,
                lives=lives,
            )
            seconds = statistics.median(finals[0].epoch_s) / ratio(finals[0], final).ratio if finals else None
            finals.append(_at_rate(final, self._epochs[number], seconds or statistics.median(epoch_s)))
        return finals

    def _open(self) -> None:
        """Fresh processes for all, unless each is to be alone, which may show only by them."""
        self._num_lives += 1
        if not self._are_steps_long():
            for entrant in list(self._running):
                self._start(entrant)
        self._is_alone = self._are_steps_long()
        if self._is_alone:
            self._close_all()

    def _are_steps_long(self) -> bool:
        return bool(self._running) and is_alone(self._running[0].job.backend, map(self._step_s, self._running))

    def _start(self, entrant: Entrant) -> Session | None:
        """A fresh process, warmed up on its longest batch: where memory is kept, it is as large as training's soon is.
        None where it fails."""
        number = entrant.trial.number
        self._close(number)
        try:
            self._sessions[number] = Session(
                msgspec.structs.replace(entrant.job, start=GOLDEN * (self._num_lives - 1) % 1),
                memory_limit_bytes=self._memory_limit_bytes,
                silence_s=entrant.silence_s,
                pulse=self._pulse,
            )
            laps = COMPILED_LAPS if entrant.compiles else 0
            done = self._sessions[number].time(Command(min_laps=laps), timeout_s=self._timeout_s)
        except TrialEndedError as end:
            self._leave(entrant, end)
            return None
        self._measurements[number].append(done.measurement)
        self._epochs[number] = done.epoch
        return self._sessions[number]

    def _round(self, *, gives_up: bool) -> bool:
        """One turn of each. With ``gives_up``, a round that others disturb is left unfinished: False."""
        if self._is_alone and self._rounds:
            self._num_lives += 1
        # a process that lives on evaluates no more than it has to
        eval_batches = EVAL_BATCHES if self.num_rounds < (1 if self._is_alone else EVAL_ROUNDS) else 0
        order = list(self._running) if self.num_rounds % 2 == 0 else list(reversed(self._running))
        before_s, load = self._cpu_s(), Load()
        laps: dict[int, tuple[Lap, ...]] = {}
        is_quiet = True
        for entrant in order:
            done = self._turn(entrant, Command(min_laps=self._laps(entrant), eval_batches=eval_batches))
            if done is not None:
                laps[entrant.trial.number] = tuple(uncompiled(done.laps))
                self._measurements[entrant.trial.number][-1] = done.measurement
            if self._is_alone:
                self._close(entrant.trial.number)
            is_quiet = load.is_quiet(self._num_cores, self._cpu_s() - before_s)
            if gives_up and not is_quiet and entrant is not order[-1]:
                return False
        self._rounds.append(Round(laps=laps, life=self._num_lives - 1, is_quiet=is_quiet))
        return True

    def _await_quiet(self) -> bool:
        end = time.monotonic() + WAIT_S
        while (left_s := end - time.monotonic()) > 0:
            load = Load()
            time.sleep(min(LOOK_S, left_s))
            if load.is_quiet(self._num_cores, 0.0):
                return True
        return False

    def _turn(self, entrant: Entrant, command: Command) -> Done | None:
        session = self._sessions.get(entrant.trial.number) or self._start(entrant)
        try:
            return session.time(command, timeout_s=self._timeout_s) if session else None
        except TrialEndedError as end:
            self._leave(entrant, end)
            return None

    def _leave(self, entrant: Entrant, end: TrialEndedError) -> None:
        number = entrant.trial.number
        self._close(number)
        self._running.remove(entrant)
        self.failures[number] = end

    def _close_all(self) -> None:
        for number in list(self._sessions):
            self._close(number)

    def _close(self, number: int) -> None:
        if (session := self._sessions.pop(number, None)) is not None:
            self._closed_cpu_s += session.cpu_s()
            session.close()

    def _step_s(self, entrant: Entrant) -> float:
        """Of its latest process, or else of its trial; zero where nothing is known."""
        timed = self._measurements[entrant.trial.number]
        found = timed[-1] if timed else entrant.trial.measurement
        return found.step_ms / 1000 if found else 0.0

    def _laps(self, entrant: Entrant) -> int:
        slowest_s = max(map(self._step_s, self._running))
        return num_laps(self._step_s(entrant), slowest_s, is_alone=self._is_alone)

    def _cpu_s(self) -> float:
        """What the processes and the pulse have spent so far."""
        pulse_s = self._pulse.cpu_s() if self._pulse else 0.0
        return self._closed_cpu_s + pulse_s + sum(session.cpu_s() for session in self._sessions.values())

    def _is_known(self) -> bool:
        if self.num_rounds < MIN_RANKED:
            return False
        first, *others = self.finals()
        if len(first.epoch_s if first.lives is None else set(first.lives)) < MIN_RANKED:
            return False
        ratios = [ratio(first, other) for other in others]
        return all(found.high / found.ratio - 1 <= NARROW and 1 - found.low / found.ratio <= NARROW for found in ratios)


def _middle(measurements: Sequence[Measurement], trial: Measurement | None) -> Measurement:
    """The process's figures that are in the middle by speed, with the largest peak, its trial's included, and the
    middle evaluation of those that had one."""
    order = sorted(measurements, key=lambda found: found.samples_per_s)
    middle = order[len(order) // 2]
    evaluated = [found.eval_samples_per_s for found in measurements if math.isfinite(found.eval_samples_per_s)]
    return msgspec.structs.replace(
        middle,
        peak_memory_bytes=max(found.peak_memory_bytes for found in (*measurements, *([trial] if trial else []))),
        eval_samples_per_s=statistics.median(evaluated) if evaluated else middle.eval_samples_per_s,
    )


def _at_rate(final: Final, epoch: Epoch, epoch_s: float) -> Final:
    """With the rates that an epoch of so many seconds has."""
    samples_per_s = epoch.num_samples / epoch_s
    measurement = msgspec.structs.replace(
        final.measurement,
        samples_per_s=samples_per_s,
        tokens_per_s=final.measurement.tokens_per_s * samples_per_s / final.measurement.samples_per_s,
        step_ms=1000 * epoch_s / epoch.num_steps,
    )
    return msgspec.structs.replace(final, measurement=measurement)


def is_alone(backend: str, steps_s: Iterable[float]) -> bool:
    """Whether every turn of a race of settings with such steps has a process of its own."""
    return backends.get(backend).is_host_memory and max(steps_s, default=0.0) >= ALONE_S


def num_laps(step_s: float, slowest_s: float, *, is_alone: bool) -> int:
    """Laps of a turn."""
    enough_s = TURN_S if is_alone else slowest_s
    return max(1, min(MAX_LAPS, round(enough_s / step_s))) if step_s else 1


def cached_s(measurement: Measurement) -> float:
    """Seconds that a compiled setting warms up for where the compiler's cache has it, at most."""
    return measurement.warm_up_s * (1 if measurement.is_from_cache else CACHED_SHARE)


def shortest_s(
    baseline_step_s: float,
    finalists: Sequence[Trial],
    backend: str,
    slowdown_since: Callable[[Trial], float] = lambda _: 1.0,
) -> float:
    """Seconds that the shortest race of these and the baseline takes, which without one is 0: starting and the longest
    batch, or more steps where they compile, once or for every turn; compiling, which later turns find in the cache; an
    evaluation (a step's time); then the rounds. ``slowdown_since`` says how much slower each is now than in its
    trial."""
    if not finalists:
        return 0.0
    steps_s = [baseline_step_s]
    opening_s, compiling_s, later_s = baseline_step_s + 1, 0.0, 0.0
    for trial in finalists:
        if trial.measurement is not None:
            slowdown = slowdown_since(trial)
            step_s = slowdown * trial.measurement.step_ms / 1000
            steps_s.append(step_s)
            opening_s += step_s * (1 if trial.strategy.padding == "max" else LONGEST)
            is_compiled = trial.strategy.compile != "none"
            opening_s += COMPILED_LAPS * step_s if is_compiled else 0.0
            compiling_s += slowdown * trial.measurement.warm_up_s
            later_s += slowdown * (cached_s(trial.measurement) if is_compiled else trial.measurement.warm_up_s)
    are_alone = is_alone(backend, steps_s)
    num_openings = MIN_ROUNDS if are_alone else 1
    round_s = sum(step_s * num_laps(step_s, max(steps_s), is_alone=are_alone) for step_s in steps_s)
    openings_s = num_openings * opening_s + compiling_s + (num_openings - 1) * later_s
    return openings_s + sum(steps_s) + MIN_ROUNDS * round_s
