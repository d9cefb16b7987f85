"""What ``run.step()`` costs over the same step written by hand: python -m benchmarks.overhead [--rounds 40]

Two copies of one model from the same weights, one stepped by autotune, one by the lines that a person would write for
the same knobs, in turns (A B, B A, ...) in one process on the same batches. The model is small, so that what surrounds
the kernels shows: a step of an ordinary model takes a hundred times as long.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune import backends
from autotune.apply import Run, apply
from autotune.data.batching import MicroBatch
from autotune.models.attention import set_attention
from autotune.models.encoder import EncoderClassifier
from autotune.stats import paired_ratio
from autotune.strategy import Strategy
from autotune.workloads.custom import workload_of

BATCH, TOKENS, STEPS = 32, 64, 5
Batch = list[MicroBatch]

CLIP_NORM = 1.0


class Foreign(nn.Module):
    """A model that knows nothing of autotune: torch's own layers, whose kernel is pinned from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Classes [B, 2] of token ids [B, T]."""
        logits: torch.Tensor = self.head(self.encoder(self.embedding(ids)).mean(1))
        return logits


def own() -> nn.Module:
    """autotune's encoder, small."""
    return EncoderClassifier(
        vocabulary_size=100, max_tokens=TOKENS, width=64, num_heads=4, ffn_width=256, num_layers=2, dropout=0.0
    )


SETTINGS: tuple[tuple[Callable[[], nn.Module], Strategy], ...] = (
    (own, Strategy(micro_batch=BATCH)),
    (own, Strategy(micro_batch=8, accumulation=4, attention="sdpa", precision="bf16")),
    (own, Strategy(micro_batch=BATCH, attention="sdpa_flash", precision="fp16")),
    (Foreign, Strategy(micro_batch=8, accumulation=4, attention="sdpa_flash", precision="bf16")),
)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def by_hand(model: nn.Module, strategy: Strategy) -> Callable[[Batch], torch.Tensor]:
    """The step as a person writes it."""
    pinned: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if isinstance(model, Foreign):
        pinned = functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    else:
        set_attention(model, strategy.attention)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: min(1.0, (step + 1) / 100))
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(strategy.precision)
    scaler = torch.amp.GradScaler("cpu", enabled=strategy.precision == "fp16")

    def step(batch: Batch) -> torch.Tensor:
        total = torch.zeros(())
        for micro in batch:
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None), pinned():
                logits = model(**micro.inputs)
            loss = F.cross_entropy(logits.float(), micro.targets, reduction="sum") / BATCH
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        scaler.unscale_(adamw)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        scaler.step(adamw)
        scaler.update()
        adamw.zero_grad(set_to_none=True)
        schedule.step()
        return total

    return step


def timed(step: Callable[[Batch], torch.Tensor], batches: Sequence[Batch]) -> float:
    """Seconds of a step, the mean over the batches; one goes untimed first."""
    step(batches[0])
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return (time.perf_counter() - start) / len(batches)


def applied(build: Callable[[], nn.Module], strategy: Strategy) -> Run:
    """autotune's run of the same model."""
    ids = torch.randint(1, 100, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(BATCH) % 2
    inputs = (ids,) if build is Foreign else (ids, torch.ones_like(ids, dtype=torch.bool))
    workload = workload_of("overhead", lambda: (seeded(build), (*inputs, targets)))
    return apply(strategy, workload, backends.get("cpu"), clip_norm=CLIP_NORM)


@click.command()
@click.option("--rounds", default=40, show_default=True)
def main(rounds: int) -> None:
    device = backends.get("cpu").device()
    print(f"{device.name}, {device.num_cores} cores, torch {device.versions['torch']}")
    for build, strategy in SETTINGS:
        run = applied(build, strategy)
        batches = [batch for batch, _ in zip(run.loader, range(STEPS), strict=False)]
        sides: dict[str, Callable[[Batch], torch.Tensor]] = {
            "autotune": run.step,
            "by hand": by_hand(seeded(build), strategy),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
                seconds[name].append(timed(sides[name], batches))
        found = paired_ratio(seconds["autotune"], seconds["by hand"])
        words = ", ".join(f"{knob} {value}" for knob, value in strategy.to_dict().items() if value not in ("none", 0))
        print(
            f"{found.ratio:.4f}x the time ({found.low:.4f} to {found.high:.4f}), {rounds} rounds of "
            f"{1000 * min(seconds['by hand']):.1f} ms steps, {build.__name__}: {words}",
            flush=True,
        )


if __name__ == "__main__":
    main()
