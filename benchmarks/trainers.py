"""What a profile brings to trainings of a user's own: python -m benchmarks.trainers [--budget 2m] [--rounds 6]

The examples for transformers' Trainer and for Lightning are searched, then trained for two epochs by their own library,
plainly and with the profile, in turns, each in a process of its own; the second epoch is timed. Beside them autotune's
own loop with the same profile, whose ratio to the plain trainer says what the trainer's loop costs. The example whose
images take long to read is trained by a plain loop, by one with what many would write by hand (bf16, a fused optimizer,
a loader process for every core), and by ``run.loader``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from autotune.report.terminal import describe, interval_words
from autotune.stats import paired_ratio

EXAMPLES = {"transformers": "transformers_trainer", "lightning": "lightning_module", "torch": "my_images"}
EPOCHS = 50
"""Of the run that is planned."""
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOLDER = Path(__file__).parent.parent / "examples"


class Clock:
    """Seconds of the second epoch."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """An epoch begins, or the last has ended."""
        if _DEVICE == "cuda":
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The last epoch's."""
        return self._marks[-1] - self._marks[-2]


def _transformers(example: Any, tuned: Any, clock: Clock) -> None:
    from transformers import TrainerCallback

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    options = {} if tuned is None else tuned.arguments("transformers")
    trainer = example.trainer(example.model(), disable_tqdm=True, logging_strategy="no", **options)
    if tuned is not None:
        tuned.prepare(trainer)
    trainer.add_callback(Marks())
    trainer.train()


def _lightning(example: Any, tuned: Any, clock: Clock) -> None:
    from lightning.pytorch.callbacks import Callback

    class Marks(Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    module, options = example.Classifier(), {}
    loader = example.DataLoader(example.dataset(), batch_size=example.BATCH, shuffle=True)
    if tuned is not None:
        module, loader, options = tuned.prepare(module), tuned.loader(example.dataset()), tuned.arguments("lightning")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    example.fit(module, loader, callbacks=[Marks()], **quiet, **options)


def _own_loop(example: Any, tuned: Any, clock: Clock) -> None:
    if hasattr(example, "trainer"):
        model, data, collate = example.model(), example.Reviews(), example.default_data_collator
        lengths = data.mask.sum(1).tolist()
    else:
        model, data, collate, lengths = example.Classifier(), example.dataset(), None, None
    run = tuned.apply(model)
    micro_batches = tuned.loader(data, lengths=lengths, collate_fn=collate)
    for _ in range(2):
        clock.mark()
        batch: list[Any] = []
        for raw in micro_batches:
            batch += run.split(raw)
            if len(batch) == tuned.strategy.accumulation:
                run.step(batch)
                batch = []
    clock.mark()


def _run_loader(example: Any, tuned: Any, clock: Clock) -> None:
    run = tuned.apply()
    for _ in range(2):
        clock.mark()
        for batch in run.loader:
            run.step(batch)
    clock.mark()


def _plain(example: Any, _: Any, clock: Clock) -> None:
    _fit(example, clock, example.loader(), contextlib.nullcontext)


def _by_hand(example: Any, _: Any, clock: Clock) -> None:
    loader = example.loader(num_workers=os.cpu_count(), persistent_workers=True, pin_memory=_DEVICE == "cuda")
    _fit(example, clock, loader, lambda: torch.autocast(_DEVICE, torch.bfloat16), fused=True)


def _fit(example: Any, clock: Clock, loader: Any, context: Callable[[], Any], **options: Any) -> None:
    model = example.Classifier().to(_DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, **options)
    for _ in range(2):
        clock.mark()
        for images, classes in loader:
            images, classes = (part.to(_DEVICE, non_blocking=True) for part in (images, classes))
            optimizer.zero_grad()
            with context():
                loss: Any = torch.nn.functional.cross_entropy(model(images), classes)
            loss.backward()
            optimizer.step()
    clock.mark()


Train = Callable[[Any, Any, Clock], None]
KINDS: dict[str, dict[str, Train]] = {
    "transformers": {"plain": _transformers, "tuned": _transformers, "own loop": _own_loop},
    "lightning": {"plain": _lightning, "tuned": _lightning, "own loop": _own_loop},
    "torch": {"plain": _plain, "by hand": _by_hand, "tuned": _run_loader},
}


def child(library: str, kind: str, profiles: str) -> None:
    """Trains once and prints the second epoch's seconds."""
    import autotune

    warnings.simplefilter("ignore")
    sys.path.append(str(FOLDER))
    example = importlib.import_module(EXAMPLES[library])
    tuned = None if kind in ("plain", "by hand") else autotune.load(_name(library), profiles=profiles)
    clock = Clock()
    KINDS[library][kind](example, tuned, clock)
    print(json.dumps({"seconds": clock.seconds}))


def _name(library: str) -> str:
    return f"{FOLDER / EXAMPLES[library]}.py:workload"


def _seconds(library: str, kind: str, profiles: Path) -> float:
    command = [sys.executable, "-c", "import sys; from benchmarks.trainers import child; child(*sys.argv[1:])"]
    done = subprocess.run([*command, library, kind, str(profiles)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{library}, {kind}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


@click.command()
@click.option("--only", type=click.Choice(list(EXAMPLES)), multiple=True)
@click.option("--budget", default="2m", show_default=True)
@click.option("--rounds", type=click.IntRange(min=2), default=6, show_default=True)
@click.option("--profiles", type=click.Path(path_type=Path), help="Of searches that are done; none is made.")
def main(only: tuple[str, ...], budget: str, rounds: int, profiles: Path | None) -> None:
    import autotune

    for library in only or EXAMPLES:
        folder = profiles or Path(tempfile.mkdtemp())
        if profiles is None:
            search = ["search", "--model", _name(library), "--budget", budget, "--profiles", str(folder)]
            search += ["--epochs", str(EPOCHS)]
            subprocess.run([sys.executable, "-m", "autotune", *search], check=True)
        print(f"{library}: {describe(autotune.load(_name(library), profiles=folder).strategy)}", flush=True)
        kinds = [*KINDS[library]]
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds):
            for kind in kinds if turn % 2 == 0 else reversed(kinds):
                found[kind].append(_seconds(library, kind, folder))
            print(f"{turn + 1} of {rounds} rounds", file=sys.stderr, flush=True)
        for kind, seconds in found.items():
            low, *_, high = ordered = sorted(seconds)
            words = "" if kind == "plain" else f"; {interval_words(paired_ratio(found['plain'], seconds))} plain"
            print(f"  {kind}: {low:.1f} .. {ordered[len(ordered) // 2]:.1f} .. {high:.1f} s{words}")


if __name__ == "__main__":
    main()
