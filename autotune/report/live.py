"""Live progress on stderr: redrawn in place on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from autotune.backends.base import Capability
from autotune.measurement import Trial
from autotune.pace import slowdown
from autotune.report.runs import quality_words
from autotune.report.terminal import (
    capability_row,
    describe,
    epoch_table,
    measured_words,
    stderr,
    trial_line,
    trial_table,
)
from autotune.search.proof import Proof
from autotune.search.settings import Observer
from autotune.search.space import Space
from autotune.strategy import Strategy
from autotune.study import runner as study_runner
from autotune.study.runner import Capacity, Cell
from autotune.training import Epoch
from autotune.trial import worker
from autotune.units import format_bytes, format_duration, format_rate

_LAST_TRIALS = 8
_EVERY_ROUND = 10
"""In a pipe, so many rounds of the final are told of one by one; then one in so many."""
_REFRESH_PER_S = 8


def _one_line(words: str, style: str = "") -> Text:
    """Cut with an ellipsis where the terminal is too narrow."""
    return Text(words, style=style, no_wrap=True, overflow="ellipsis")


class _Display:
    """A rich Live where there is a terminal; nothing where there is none."""

    def __init__(self) -> None:
        self.console = stderr()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=_REFRESH_PER_S,
                transient=True,
                redirect_stdout=False,
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line for pipes and logs; a terminal sees the display instead."""
        if self._live is None:
            self.console.print(line, markup=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """The display as it is now."""
        raise NotImplementedError


class StageDisplay(_Display):
    """One line that says what is being prepared."""

    def __init__(self) -> None:
        super().__init__()
        self._spinner = Spinner("dots", "")

    def stage(self, text: str) -> None:
        """What is being done now."""
        self._spinner.update(text=text)
        self.say(text)

    def render(self) -> RenderableType:
        """A spinner and the stage."""
        return self._spinner


class ProbeDisplay(_Display):
    """The capabilities as they are found."""

    def __init__(self, num_rows: int = 12) -> None:
        super().__init__()
        self._rows: list[Capability] = []
        self._started: set[str] = set()
        self._num_rows = num_rows
        self._current = "starting"
        self._spinner = Spinner("dots", "")
        self._start = time.monotonic()

    def on_start(self, name: str) -> None:
        """A check starts."""
        self._current = name
        self._started.add(name)

    def on_capability(self, capability: Capability) -> None:
        """A check ended."""
        self._rows.append(capability)
        if capability.name not in self._started:  # known from before
            return
        words = ", ".join(measured_words(capability.measured))
        self.say(f"{'yes' if capability.value else 'no ':3} {capability.name}  {words or capability.reason}")

    def render(self) -> RenderableType:
        """The last results and the check under way."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for capability in self._rows[-self._num_rows :]:
            name, verdict, figures = capability_row(capability)
            table.add_row(name, verdict, _one_line(figures))
        self._spinner.update(
            text=f"probing {self._current}, {len(self._rows)} done, {time.monotonic() - self._start:.0f} s"
        )
        return Group(table, self._spinner)


class SearchDisplay(_Display, Observer):
    """The trial under way, the best so far, the time, the last trials."""

    def __init__(self, title: str, *, budget_s: float | None, max_trials: int | None) -> None:
        super().__init__()
        self._title = title
        self._budget_s, self._max_trials = budget_s, max_trials
        self._start = time.monotonic()
        self._trial_start = self._start
        self._trials: list[Trial] = []
        self._best: Trial | None = None
        self._current = "starting"
        self._doing = ""
        self._space_words = ""
        self._left_out_words = ""

    def on_space(self, space: Space) -> None:
        """What will be searched."""
        knobs = ", ".join(f"{knob} {len(values)}" for knob, values in space.values.items())
        self._space_words = f"{space.size:,} settings ({knobs})"
        self.say(f"searching {self._space_words}")
        if space.left_out:
            self._left_out_words = f"left out: {', '.join(space.left_out)}; --explain-space says why"
            self.say(f"left out: {len(space.left_out)} values; --explain-space says which and why")

    def on_trial_start(self, number: int, strategy: Strategy, origin: str) -> None:
        """A trial starts."""
        self._trial_start = time.monotonic()
        words = describe(strategy)
        self._current = f"trial {number}, {origin}" + (f": {words}" if words != origin else "")
        self._doing = "starting"

    def on_progress(self, progress: worker.Progress) -> None:
        """The trial under way got on."""
        self._doing = progress.stage
        if progress.lap is not None:
            self._doing = f"{progress.num_laps} laps, {format_rate(progress.samples_per_s)} samples/s"

    def on_trial_end(self, trial: Trial, best: Trial | None) -> None:
        """A trial ended."""
        self._trials.append(trial)
        self._best = best
        self.say(trial_line(trial))

    def on_resume(self, trials: Sequence[Trial], best: Trial | None, spent_s: float) -> None:
        """An earlier run of this search was interrupted; its trials count."""
        self._trials, self._best = list(trials), best
        self._start -= spent_s
        tried = "1 trial" if len(trials) == 1 else f"{len(trials)} trials"
        self._space_words += f"; goes on after {tried} of an interrupted search (--fresh starts anew)"
        self.say(f"going on after {tried} and {format_duration(spent_s)} of an interrupted search")

    def on_race(self, name: str, done: int) -> None:
        """A round of a race ended; at 0 it starts."""
        if done == 0:
            self._trial_start = time.monotonic()
        self._current = name
        self._doing = f"round {done} done" if done else "starting"
        if done < _EVERY_ROUND or done % _EVERY_ROUND == 0:
            self.say(f"{self._current}, {self._doing}")

    def on_taking_back(self, done: int, num_knobs: int) -> None:
        """A round of the best with what differs from it by one knob ended; at 0 they start."""
        if done == 0:
            self._trial_start = time.monotonic()
        self._current = f"what each knob brings: the best in turns with {num_knobs} that lack one"
        self._doing = f"round {done} done" if done else "starting"
        self.say(f"{self._current}, {self._doing}")

    def on_cold_start(self, trial: Trial) -> None:
        """The best is started once more, with nothing compiled."""
        self._begin(f"trial {trial.number} once more, with nothing compiled: how long a first start takes", "compiling")

    def on_guess(self) -> None:
        """A few steps are timed in each precision."""
        self._begin("a few steps in each precision, to know what to try first", "timing")

    def on_reference(self) -> None:
        """The plain baseline trains the steps that the last test compares."""
        self._begin("the baseline's losses, with which the last test compares", "training")

    def on_rounding(self) -> None:
        """The plain baseline trains them again, its weights nudged."""
        self._begin("a little off: how far do roundings take the baseline's own losses?", "training")

    def on_proof(self, trial: Trial) -> None:
        """The last test of a setting starts."""
        self._begin(
            f"last test of trial {trial.number}: same losses as the baseline, the longest samples in a row", "starting"
        )

    def _begin(self, current: str, doing: str) -> None:
        self._trial_start = time.monotonic()
        self._current, self._doing = current, doing
        self.say(current)

    def on_proof_end(self, trial: Trial, proof: Proof) -> None:
        """The last test of a setting ended."""
        self.say(f"trial {trial.number}: {proof.outcome} {proof.reason}".rstrip())

    def render(self) -> RenderableType:
        """The whole display."""
        now = time.monotonic()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        grid.add_row("now", _one_line(self._current))
        grid.add_row("", _one_line(f"{self._doing}, {format_duration(now - self._trial_start)}", "bright_black"))
        for name, line in zip(("best", ""), self._best_lines(), strict=False):
            grid.add_row(name, line)
        grid.add_row("time", self._time_words(now - self._start))
        parts: list[RenderableType] = [Text(self._title, style="bold"), Text(self._space_words, style="bright_black")]
        if self._left_out_words:
            parts.append(_one_line(self._left_out_words, "bright_black"))
        parts += ["", grid]
        if self._budget_s is not None:
            parts.append(ProgressBar(total=self._budget_s, completed=min(now - self._start, self._budget_s)))
        return Group(*parts, "", trial_table(list(reversed(self._trials[-_LAST_TRIALS:]))))

    def _best_lines(self) -> list[Text]:
        if self._best is None or not self._best.samples_per_s:
            return [_one_line("none yet", "bright_black")]
        words = Text(f"{format_rate(self._best.samples_per_s)} samples/s", style="green")
        reference = self._trials[0]
        if reference.samples_per_s:
            ratio = self._best.samples_per_s / reference.samples_per_s * slowdown(self._best, reference.pulse_s)
            words.append(f", about {ratio:.2f}x the baseline")
        return [words, _one_line(f"trial {self._best.number}: {describe(self._best.strategy)}", "bright_black")]

    def _time_words(self, elapsed_s: float) -> Text:
        words = Text(f"{format_duration(elapsed_s)} elapsed")
        if self._budget_s is not None:
            words.append(f", {format_duration(max(0.0, self._budget_s - elapsed_s))} left")
        if self._max_trials is not None:
            words.append(f", {len(self._trials)} of {self._max_trials} trials")
        return words.append("  (Ctrl-C keeps the best so far)", style="bright_black")


class TrainDisplay(_Display):
    """The epochs done and the one under way."""

    def __init__(self, title: str, *, num_steps: int, num_epochs: int, done: Sequence[Epoch] = ()) -> None:
        super().__init__()
        self._title = title
        self._epochs = list(done)
        self._num_steps, self._num_epochs = num_steps, num_epochs
        self._start = time.monotonic()
        self._rate_from: int | None = None
        """Samples of the epoch that were done when its rate began to be taken."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps {task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task(
            f"epoch {min(len(done) + 1, num_epochs)}/{num_epochs}", total=num_steps, rate=""
        )

    def on_step(self, epoch: int, step: int, num_samples: int) -> None:
        """A step ended."""
        if step == 1 or self._rate_from is None:
            self._start, self._rate_from = time.monotonic(), num_samples
            self._progress.reset(self._task, description=f"epoch {epoch}/{self._num_epochs}", rate="")
        elapsed_s = time.monotonic() - self._start
        rate = f"{format_rate((num_samples - self._rate_from) / elapsed_s)} samples/s" if elapsed_s > 1 else ""
        self._progress.update(self._task, completed=step, rate=rate)
        if step % max(1, self._num_steps // 5) == 0:
            self.say(f"epoch {epoch}/{self._num_epochs}, step {step} of {self._num_steps} {rate}")

    def on_evaluation(self, epoch: int) -> None:
        """The epoch's evaluation starts."""
        self._progress.update(self._task, description=f"epoch {epoch}/{self._num_epochs}, evaluating", rate="")

    def on_epoch(self, epoch: Epoch) -> None:
        """An epoch ended."""
        self._epochs.append(epoch)
        quality = "accuracy" if epoch.test_perplexity is None else "perplexity"
        self.say(
            f"epoch {epoch.epoch}/{self._num_epochs} done: train loss {epoch.train_loss:.4f}, test loss "
            f"{epoch.test_loss:.4f}, {quality} {quality_words(epoch)}, {format_rate(epoch.samples_per_s)} samples/s"
        )

    def render(self) -> RenderableType:
        """The epochs so far and the bar."""
        parts: list[RenderableType] = [Text(self._title, style="bold")]
        if self._epochs:
            parts.append(epoch_table(self._epochs))
        return Group(*parts, self._progress)


class StudyDisplay(_Display, study_runner.Observer):
    """The cells done and the one under way."""

    def __init__(self, title: str, *, num_steps: int) -> None:
        super().__init__()
        self._title, self._num_steps = title, num_steps
        self._lines: list[str] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=num_steps)

    def on_cell(self, technique: str, batch_size: int, place: int, count: int) -> None:
        """A cell starts."""
        words = f"{place} of {count}: {technique}, batch {batch_size}"
        self._progress.reset(self._task, description=words)
        self.say(words)

    def on_progress(self, step: int) -> None:
        """Steps that the cell has trained."""
        self._progress.update(self._task, completed=step)

    def on_cell_end(self, cell: Cell) -> None:
        """A cell ended."""
        line = f"{cell.technique}, batch {cell.batch_size}: {cell.outcome} {cell.reason}".rstrip()
        if cell.trained is not None:
            figures = (
                f"{format_rate(cell.trained.samples_per_s)} samples/s",
                f"peak {format_bytes(cell.trained.peak_memory_bytes)}",
                f"test loss {cell.trained.test_loss:.4f}",
            )
            line += f"  [{', '.join(figures)}], {format_duration(cell.wall_s)}"
        self._tell(line)

    def on_capacity(self, capacity: Capacity) -> None:
        """The largest batch of a technique is known."""
        self._tell(f"{capacity.technique}: largest batch {capacity.batch_size or 'none'} ({capacity.reason})")

    def render(self) -> RenderableType:
        """The cells so far and the bar."""
        lines = [_one_line(line) for line in self._lines[-2 * _LAST_TRIALS :]]
        return Group(Text(self._title, style="bold"), *lines, self._progress)

    def _tell(self, line: str) -> None:
        self._lines.append(line)
        self.say(line)
