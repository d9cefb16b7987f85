"""Times the real step of a real run, on batches that stand for a whole epoch.

The epoch is planned as training would plan it; its batches are ordered by the tokens they compute, and visited in a
low-discrepancy order, so that any few consecutive ones cover the workload's lengths. Rates are carried from the visited
batches to the epoch by the ratio of their cost (the ratio estimator, Cochran 1977, ch. 6), which cost.py fits.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice

import numpy as np
import torch

from autotune.apply import Run
from autotune.compiler import graph_breaks, is_from_cache, num_compiled
from autotune.cost import BY_TOKENS, Cost, Work, fit, total
from autotune.data.batching import MicroBatch, PlannedBatch, every_shape, full_batches
from autotune.laps import STEADY, Epoch, first_steady, lap_work, power_w, steady, uncompiled
from autotune.measurement import Lap, Measurement
from autotune.pace import Beats, at_pulse, even, usual_pulse_s
from autotune.stats import relative_margin

LAP_S = 0.1
"""Steps shorter than this are timed several at a time, so that synchronising does not slow what is measured."""
NARROW = 0.03
"""Half a 95 % interval, relative: the mean of a trial's laps is known well enough to compare it with others."""
MIN_LOSS_SCALE = 1.0
"""An fp16 run whose loss scale has fallen below this from 65536 has overflowed at sixteen steps more than it should."""
MOST_STOPPED = 5
"""So often is what was stopped in its middle timed again: a machine where that goes on is as slow as that."""
MIN_EVAL_BATCHES = 2
"""However long they take, where so many may be timed."""
SOAK_EVAL_BATCHES = 4
STEPS_TO_PLAN = 2
"""Of one shape, on an accelerator: one for which kernels are chosen and planned, one as those after it."""
STEPS_TO_RECORD = 3
"""Of one shape: one to warm up, one that is recorded as CUDA graphs, one to replay them (torch 2.11)."""
_MAX_STREAM = 200_000


class Timer:
    """Times one run; laps accumulate over calls, so that rivals can be timed in turns.

    ``start`` says where in the order of the batches it begins, as a share of them, 0 to 1: timers of one run that begin
    apart do not all time the same few batches. ``usual_cost`` is how long batches take by their shape, until enough
    laps say it. The first lap, which is warm-up, begins with the longest batch: the peak memory is the worst case, and
    what does not fit fails at once. On an accelerator it goes on until every shape of full batches has come up, and
    ``on_opening`` is called after each of these steps.
    """

    def __init__(
        self,
        run: Run,
        start: float = 0.0,
        beats: Beats | None = None,
        usual_cost: Cost = BY_TOKENS,
        on_opening: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._beats, self._usual_cost = run, beats or Beats(), usual_cost
        self._on_opening = on_opening
        self._plan = sorted(run.loader.plan(0), key=lambda batch: batch.padded_tokens)
        order = [self._plan[index] for index in _low_discrepancy(len(self._plan))]
        opening = self._plan[-1:]
        if not run.backend.is_host_memory:
            order = full_batches(order)
            opening += self._repeated(every_shape(order))
        first = int(start * len(order))
        self._num_opening = len(opening)
        stream = [*opening, *islice(cycle(order[first:] + order[:first]), _MAX_STREAM)]
        self._planned, self._batches = iter(stream), run.loader.over(stream)
        self._eval_plan = sorted(run.evaluation_plan(), key=lambda batch: batch.padded_tokens)
        self._eval_batches: Iterator[tuple[PlannedBatch, list[MicroBatch]]] | None = None
        self._eval_laps: list[Lap] = []
        """Of a batch each."""
        self._fitted: tuple[int, Cost] = (0, usual_cost)
        self._num_steps = self._num_stopped = 0
        self._enough_steps: float = math.inf
        """Of a lap, on an accelerator: it takes far longer to train steps that are recorded than to ask for them."""
        self.laps: list[Lap] = []

    def lap(self) -> Lap:
        """Times the next steps, and others where all was stopped meanwhile. Raises whatever the run raises,
        FloatingPointError where it diverges."""
        run, synchronize = self._run, self._run.backend.synchronize
        losses: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        planned: list[PlannedBatch] = []
        num_samples = num_tokens = 0
        wait_s = 0.0
        compiled_before = num_compiled()
        gc_was_enabled = gc.isenabled()
        gc.disable()
        synchronize()
        before_j = run.backend.energy_j()
        start = now = time.perf_counter()
        try:
            while self._num_opening > 0 or (now - start < LAP_S and len(losses) < self._enough_steps):
                began = now
                batch = next(self._batches)
                self._num_opening -= 1
                wait_s += time.perf_counter() - now
                losses.append(run.step(batch))
                if run.step.grad_norm is not None:
                    norms.append(run.step.grad_norm)
                planned.append(next(self._planned))
                num_samples += sum(micro.num_samples for micro in batch)
                num_tokens += sum(micro.num_tokens for micro in batch)
                if not self.laps:
                    synchronize()
                    self._on_opening()
                now = time.perf_counter()
                last_s = now - began
            synchronize()
            end = time.perf_counter()
            after_j = run.backend.energy_j()
        finally:
            if gc_was_enabled:
                gc.enable()
        paused_s, pulse_s = self._beats.during(start, end)
        lap = Lap(
            seconds=end - start - paused_s,
            wait_s=wait_s * (1 - paused_s / (end - start)),
            num_steps=len(losses),
            num_samples=num_samples,
            num_tokens=num_tokens,
            padded_tokens=sum(batch.padded_tokens for batch in planned),
            padded_squares=sum(batch.padded_squares for batch in planned),
            losses=self._finite(losses, norms),
            joules=None if before_j is None or after_j is None else after_j - before_j,
            num_compiled=num_compiled() - compiled_before,
            pulse_s=pulse_s,
        )
        if not run.backend.is_host_memory:
            step_s = (end - start) / len(losses) if self.laps else last_s
            self._enough_steps = math.ceil(LAP_S / step_s)
        if self._was_stopped(start, end):
            return self.lap()
        self.laps.append(lap)
        return lap

    def _was_stopped(self, start_s: float, end_s: float) -> bool:
        """Whether what was timed then should be timed again: not a first lap, which has the warm-up."""
        if not self.laps or self._num_stopped == MOST_STOPPED or not self._beats.stopped(start_s, end_s):
            return False
        self._num_stopped += 1
        return True

    def resume(self) -> None:
        """Trains a step untimed where a lap has several: the first one after another process's turn takes up to half as
        long again, by chance, as threads wake and caches fill."""
        if self.laps and self.laps[-1].num_steps > 1:
            self._run.step(next(self._batches))
            next(self._planned)
            self._num_steps += 1

    def soak(self, *, enough_steps: int, enough_s: float, on_step: Callable[[int], None] = lambda _: None) -> int:
        """Trains on the longest samples there are, all in one batch, again and again; then evaluates the longest; then
        trains as an epoch does, whose mix of lengths takes more of a CPU's memory than the longest alone. Each half
        ends at half the steps or half the seconds, whichever comes first. Returns the steps taken.

        Raises whatever the run raises, FloatingPointError where it diverges.
        """
        run, num_steps = self._run, 0
        longest = np.argsort(run.loader.lengths, kind="stable")[-run.strategy.global_batch :]
        halves = (run.loader.plan_of([longest]) * enough_steps, run.loader.plan(0))
        for plan in halves:
            start = time.perf_counter()
            for steps, batch in enumerate(run.loader.over(plan), 1):
                loss = run.step(batch)
                run.backend.synchronize()
                self._finite([loss], [] if run.step.grad_norm is None else [run.step.grad_norm])
                num_steps += 1
                on_step(num_steps)
                if 2 * steps >= enough_steps or 2 * (time.perf_counter() - start) >= enough_s:
                    break
            if plan is halves[0]:
                run.evaluate(run.evaluation_batches(self._eval_plan[-SOAK_EVAL_BATCHES:]))
        return num_steps

    def evaluate(self, max_batches: int, enough_s: float) -> None:
        """Times an evaluation of some batches that cover the test set's lengths, until all calls have timed enough.

        One loader serves all calls, as one serves an epoch's evaluation.
        """
        if self._eval_batches is None:
            if not self._run.backend.is_host_memory:
                shapes = self._repeated(every_shape(full_batches(self._eval_plan)))
                self._run.evaluate(self._run.evaluation_batches(shapes))
            plan = [self._eval_plan[index] for index in _low_discrepancy(len(self._eval_plan))]
            stream = list(islice(cycle(plan), _MAX_STREAM))
            self._eval_batches = zip(stream, self._run.evaluation_batches(stream), strict=True)
        synchronize = self._run.backend.synchronize
        for _ in range(max_batches):
            timed = self._evaluated()
            if len(timed) >= MIN_EVAL_BATCHES and sum(lap.seconds for lap in timed) >= enough_s:
                return
            compiled_before = num_compiled()
            synchronize()
            start = time.perf_counter()
            planned, batch = next(self._eval_batches)
            wait_s = time.perf_counter() - start
            self._run.evaluate([batch])
            synchronize()
            end = time.perf_counter()
            paused_s, pulse_s = self._beats.during(start, end)
            if self._was_stopped(start, end):
                continue
            self._eval_laps.append(
                Lap(
                    seconds=end - start - paused_s,
                    wait_s=wait_s,
                    num_steps=1,
                    num_samples=planned.num_samples,
                    num_tokens=sum(micro.num_tokens for micro in batch),
                    padded_tokens=planned.padded_tokens,
                    padded_squares=planned.padded_squares,
                    losses=(),
                    num_compiled=num_compiled() - compiled_before,
                    pulse_s=pulse_s,
                )
            )

    def _repeated(self, shapes: list[PlannedBatch]) -> list[PlannedBatch]:
        """Each as often as it takes until it is as fast as it will be."""
        times = STEPS_TO_RECORD if self._run.strategy.records_shapes else STEPS_TO_PLAN
        return [batch for batch in shapes for _ in range(times)]

    def _evaluated(self) -> list[Lap]:
        """The evaluated batches that count: the first is warm-up where it costs clearly more than those after it, and
        so are those in which something was compiled."""
        first, later = self._eval_laps[:1], self._eval_laps[1:]
        is_warm_up = bool(later) and self._rate(first) > STEADY * self._rate(later)
        return uncompiled(later if is_warm_up else self._eval_laps)

    @functools.cached_property
    def epoch(self) -> Epoch:
        """What an epoch of the run consists of."""
        num_samples = sum(batch.num_samples for batch in self._plan)
        work = total(map(_work, self._plan))
        return Epoch(work=work, num_samples=num_samples, num_steps=len(self._plan), usual_cost=self._usual_cost)

    def epoch_s(self, laps: list[Lap]) -> float:
        """Seconds of a whole training epoch at the rate of some laps."""
        return self._rate(laps) * self._cost().of(self.epoch.work)

    @property
    def pulse_s(self) -> float | None:
        """The device's own speed that the rates are for, the timed laps'; None where it was not taken."""
        return usual_pulse_s(uncompiled(self.laps[self._num_warm_up() :]))

    def samples_per_s(self) -> float:
        """Real samples per second by what has been timed so far."""
        return self.epoch.num_samples / self.epoch_s(self.steady()[1])

    def margin(self, laps: list[Lap]) -> float:
        """Half the 95 % interval of the rate that some laps give, relative."""
        cost = self._cost()
        return relative_margin([lap.seconds / cost.of(lap_work(lap)) for lap in even(laps)])

    def steady(self) -> tuple[list[Lap], list[Lap]]:
        """Warm-up laps and timed laps so far, all at the speed that the device had in the timed ones."""
        pulse_s = self.pulse_s
        return steady([at_pulse(lap, pulse_s, pulse_s) for lap in self.laps], self._cost())

    def measurement(self) -> Measurement:
        """The figures of all laps so far. Needs at least one lap."""
        warm_up, timed = self.steady()
        rate, cost = self._rate(timed), self._cost()
        drawn_w, eval_samples_per_s = power_w(timed), math.inf
        num_breaks, graph_break = graph_breaks()
        if self._eval_laps:
            evaluated = [at_pulse(lap, self.pulse_s, self.pulse_s) for lap in self._evaluated()]
            eval_s = self._rate(evaluated) * cost.of(total(map(_work, self._eval_plan)))
            eval_samples_per_s = self._run.workload.num_test / eval_s
        return Measurement(
            samples_per_s=self.samples_per_s(),
            tokens_per_s=sum(lap.num_tokens for lap in timed) / sum(lap.seconds for lap in timed),
            step_ms=1000 * self.epoch_s(timed) / len(self._plan),
            eval_samples_per_s=eval_samples_per_s,
            warm_up_s=max(0.0, sum(lap.seconds - rate * cost.of(lap_work(lap)) for lap in warm_up)),
            loader_wait=sum(lap.wait_s for lap in timed) / sum(lap.seconds for lap in timed),
            peak_memory_bytes=self._run.backend.peak_memory_bytes(),
            joules_per_sample=None if drawn_w is None else drawn_w / self.samples_per_s(),
            epoch_s=tuple(self.epoch_s([lap]) for lap in timed),
            losses=tuple(loss for lap in self.laps for loss in lap.losses),
            num_recompiled=sum(lap.num_compiled for lap in self.laps[self._num_warm_up() :]),
            is_from_cache=is_from_cache(),
            num_graph_breaks=num_breaks,
            graph_break=graph_break,
            launched_evaluation=self._run.evaluation.launched_because,
            pulse_s=self.pulse_s,
        )

    def _num_warm_up(self) -> int:
        return first_steady(even(self.laps), self._cost()) if self.laps else 0

    def _rate(self, laps: list[Lap]) -> float:
        return sum(lap.seconds for lap in laps) / self._cost().of(total(map(lap_work, laps)))

    def _cost(self) -> Cost:
        if self._fitted[0] != len(self.laps):
            laps = even(self.laps[1:])
            works, seconds = [lap_work(lap) for lap in laps], [lap.seconds for lap in laps]
            self._fitted = len(self.laps), fit(works, seconds, self._usual_cost)
        return self._fitted[1]

    def _finite(self, losses: Sequence[torch.Tensor], norms: Sequence[torch.Tensor]) -> tuple[float, ...]:
        """The losses as numbers. In fp16 a gradient may overflow, the scaler skips such a step; a loss may not."""
        first, self._num_steps = self._num_steps + 1, self._num_steps + len(losses)
        found = tuple(torch.stack(list(losses)).float().tolist())
        scale = self._run.step.loss_scale
        if scale is not None and scale < MIN_LOSS_SCALE:
            raise FloatingPointError(f"the gradients overflow at every step up to step {self._num_steps}")
        gradients = torch.stack(list(norms)).float().tolist() if norms and scale is None else [0.0] * len(found)
        for step, (loss, norm) in enumerate(zip(found, gradients, strict=True), first):
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss {loss} at step {step}")
            if not math.isfinite(norm):
                raise FloatingPointError(f"gradient norm {norm} at step {step}")
        return found


def _work(batch: PlannedBatch) -> Work:
    return Work(1, batch.padded_tokens, batch.padded_squares)


def _low_discrepancy(count: int) -> Iterator[int]:
    """Each of ``range(count)`` once, any few consecutive ones spread over all (van der Corput 1935, base 2)."""
    bits = max(1, (count - 1).bit_length())
    for number in range(1, (1 << bits) + 1):
        index = int(format(number % (1 << bits), f"0{bits}b")[::-1], 2)
        if index < count:
            yield index


def time_until(
    timer: Timer,
    *,
    min_laps: int,
    min_s: float,
    enough_s: float,
    narrow: float,
    least_laps: int = 3,
    on_lap: Callable[[Lap], None],
) -> None:
    """Times until there are ``min_laps`` laps that cover ``min_s`` and whose mean is known to ``narrow`` (half its 95 %
    interval, relative), or until ``min_laps``, ``least_laps`` at most, cover ``enough_s``; where a lap takes so long
    that fewer cover three times that, until they do.

    The warm-up of a timer's first laps does not count.
    """
    first = len(timer.laps)
    while True:
        on_lap(timer.lap())
        timed = timer.laps[first:]
        if not first:
            timed = timer.steady()[1] if len(timed) > 1 else []
        seconds = sum(lap.seconds for lap in timed)
        is_known = len(timed) >= min_laps and seconds >= min_s and (math.isinf(narrow) or timer.margin(timed) <= narrow)
        if is_known or (len(timed) >= min(least_laps, min_laps) and seconds >= enough_s) or seconds >= 3 * enough_s:
            return
