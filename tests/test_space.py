"""What may be tried, in which order, and what counts as better."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, get_args, get_type_hints

import msgspec
import optuna
import pytest
import torch
from torch import nn

from autotune import backends
from autotune.backends.base import Capability
from autotune.measurement import Trial
from autotune.probe import Hardware
from autotune.search.guess import compiled_guess, expert_guess
from autotune.search.memory import Fit, MemoryModel
from autotune.search.objective import BALANCED, FASTEST, LEANEST, THRIFTIEST, PlannedRun, hopeless, loss_of
from autotune.search.sampling import Sampler
from autotune.search.space import Space, build_space
from autotune.strategy import Padding, Strategy
from autotune.trial.worker import Progress
from autotune.workloads.base import Workload
from autotune.workloads.custom import workload_of
from tests import factories
from tests.scripted import CPU, Prepared

GIB = 2**30


def test_only_what_the_probe_allows_is_in_the_space(prepared: Prepared) -> None:
    space = build_space(
        factories.hardware(
            matmul__fp16="too slow: 1 GFLOP/s against 200 in fp32",
            attention__sdpa_flash__bf16="refused: no kernel",
            compile__default="refused: no C++ compiler",
        ),
        CPU,
        prepared[1],
    )
    assert "fp16" not in space.values["precision"]
    assert "default" not in space.values["compile"]
    assert space.left_out["precision=fp16"] == "too slow: 1 GFLOP/s against 200 in fp32"
    assert ("sdpa_flash", "fp32") in space.pairs
    assert ("sdpa_flash", "bf16") not in space.pairs
    asked = [space.strategy(dict(zip(space.values, values, strict=True))) for values in _some(space)]
    assert [s.precision for s in asked if s.attention == "sdpa_flash" and not space.refusal(s)].count("bf16") == 0


def _some(space: Space) -> list[tuple[Any, ...]]:
    return list(itertools.product(*space.values.values()))


def test_what_is_too_slow_is_searched_when_asked_for_and_what_is_refused_is_not(prepared: Prepared) -> None:
    hardware = factories.hardware(
        matmul__fp16="too slow: 1 GFLOP/s against 200 in fp32", compile__default="refused: no C++ compiler"
    )
    space = build_space(hardware, CPU, prepared[1], includes_slow=True)
    assert "fp16" in space.values["precision"]
    assert space.values["compile"] == ("none",)


def small(*layers: nn.Module) -> Workload:
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    return workload_of("small", lambda: (copy.deepcopy(model), (torch.randn(8, 3, 8, 8), torch.arange(8) % 2)))


def test_a_model_without_attention_is_not_held_to_how_slow_attention_is() -> None:
    hardware = factories.hardware(attention__eager__bf16="too slow: 109 ms", attention__eager__fp16="too slow: 109 ms")
    space = build_space(hardware, CPU, small(nn.Conv2d(3, 8, 3)))
    assert {("eager", "fp32"), ("eager", "bf16"), ("eager", "fp16")} <= space.pairs
    assert expert_guess(space, hardware, CPU).precision == "bf16"


def test_batch_normalisation_keeps_the_batch_whole() -> None:
    space = build_space(factories.hardware(), CPU, small(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    assert space.values["micro_batch"] == (8,)
    assert "batch normalisation" in space.left_out["micro_batch=4"]
    assert expert_guess(space, factories.hardware(), CPU).micro_batch == 8


def test_a_loss_that_is_no_mean_over_samples_keeps_the_batch_whole() -> None:
    """Tokens without a target, in numbers that differ: a mean over tokens weighs them otherwise in every split."""
    ids = torch.randint(0, 10, (8, 12), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.arange(12) < torch.arange(12, 4, -1)[:, None], ids, -100)
    ragged = workload_of("ragged", lambda: (nn.Embedding(10, 10), (ids, targets)))
    space = build_space(factories.hardware(), CPU, ragged)
    assert space.values["micro_batch"] == (8,)
    assert "not the mean of its samples' losses" in space.left_out["micro_batch=4"]
    whole = workload_of("whole", lambda: (nn.Embedding(10, 10), (ids, ids)))
    assert build_space(factories.hardware(), CPU, whole).values["micro_batch"] == (1, 2, 4, 8)
    summed = workload_of("summed", lambda: (nn.Linear(2, 2), (torch.ones(4, 2), torch.ones(4)), lambda o, t: o.sum()))
    assert "not the mean of its samples' losses" in (summed.split_refusal or "")


def test_a_model_that_cannot_be_tried_on_a_sample_has_its_reasons_elsewhere() -> None:
    """Batch normalisation of one value a channel is an error in training; of a batch it is none."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    workload = workload_of("norm", lambda: (copy.deepcopy(model), (torch.randn(8, 4), torch.arange(8) % 2)))
    assert build_space(factories.hardware(), CPU, workload).values["attention"] == ("eager",)
    broken = workload_of("broken", lambda: (nn.Linear(3, 2), (torch.randn(8, 4), torch.arange(8) % 2)))
    assert broken.refused_kernels == {}
    assert "cannot be told" in (broken.split_refusal or "")


class Attending(nn.Module):
    """Attention over embedded tokens, with a mask that it makes of them or without."""

    def __init__(self, makes_mask: bool) -> None:
        super().__init__()
        self.embedding, self.makes_mask = nn.Embedding(10, 8), makes_mask

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)[:, None]
        mask = (ids != 0)[:, None, None] if self.makes_mask else None
        y: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return y[:, 0].mean(1)


@pytest.mark.parametrize("makes_mask", [False, True])
def test_a_mask_is_seen_where_the_kernel_gets_one(makes_mask: bool) -> None:
    ids = torch.arange(8 * 12).reshape(8, 12) % 10
    workload = workload_of("own", lambda: (Attending(makes_mask), (ids, torch.arange(8) % 8)))
    assert workload.has_masked_attention == makes_mask


def test_a_kernel_that_a_models_dropout_rules_out_is_left_out_with_torchs_reason() -> None:
    def make(dropout: float) -> Workload:
        def build() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
            return nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 2)), (torch.randn(4, 4, 16), torch.arange(4) % 2)

        return workload_of("layers", build)

    dropped = build_space(factories.hardware(), CPU, make(0.1))
    assert "sdpa_flash" not in dropped.values["attention"]
    assert "dropout" in dropped.left_out["attention=sdpa_flash"]
    assert "sdpa_flash" in build_space(factories.hardware(), CPU, make(0.0)).values["attention"]


def test_a_kernel_that_takes_no_mask_is_for_models_without_one(prepared: Prepared) -> None:
    hardware = factories.hardware(attention__sdpa_flash__bf16="refused: no kernel; runs without a mask")
    capabilities = tuple(
        msgspec.structs.replace(one, measured={"unmasked_ms": 0.01}) if one.name == "attention.sdpa_flash.bf16" else one
        for one in hardware.capabilities
    )
    hardware = msgspec.structs.replace(hardware, capabilities=capabilities)
    masked = build_space(hardware, CPU, prepared[1])
    assert ("sdpa_flash", "bf16") not in masked.pairs
    space = build_space(hardware, CPU, dataclasses.replace(prepared[1], is_masked=False))
    assert ("sdpa_flash", "bf16") in space.pairs
    assert expert_guess(space, hardware, CPU).attention == "sdpa_flash"


def test_every_value_that_is_not_searched_has_its_reason(prepared: Prepared) -> None:
    space = build_space(factories.hardware(compile__default="refused: no compiler"), CPU, small(nn.Conv2d(3, 8, 3)))
    kinds = {knob: get_args(kind) for knob, kind in get_type_hints(Strategy).items() if get_args(kind)}
    for knob, values in kinds.items():
        for value in values:
            assert value in space.values[knob] or space.left_out[f"{knob}={value}"], f"{knob}={value}"
    assert space.left_out["compile_scope=blocks"] == "the model repeats no block"
    assert space.values["threads"] == (0, 1)
    assert space.left_out["threads=2"] == "unknown: not probed"
    assert space.left_out["workers=8"] == f"there are {factories.hardware().device.num_cores} cores"


def test_packed_is_for_models_that_take_it_and_not_compiled(prepared: Prepared) -> None:
    space = build_space(factories.hardware(), CPU, prepared[1])
    packed = Strategy(micro_batch=32, padding="packed")
    assert "packed" in space.values["padding"]
    assert space.refusal(packed) is None
    assert space.refusal(msgspec.structs.replace(packed, compile="default"))
    other = build_space(factories.hardware(), CPU, small(nn.Conv2d(3, 8, 3)))
    assert "in one row" in other.left_out["padding=packed"]


def test_cuda_graphs_are_not_combined_with_accumulation(prepared: Prepared) -> None:
    space = build_space(factories.hardware(), CPU, prepared[1])
    graphs = Strategy(micro_batch=8, accumulation=4, compile="reduce-overhead")
    assert "169545" in (space.refusal(graphs) or "")
    assert space.refusal(Strategy(micro_batch=32, compile="reduce-overhead")) is None


def cuda_hardware(**refused: str) -> Hardware:
    """As ``factories.hardware``, with what only a CUDA device is asked."""
    found = factories.hardware(**refused)
    names = ("graphs.step", "packed.bf16", "compile.reduce-overhead")
    more = [Capability(name=name, value=True) for name in names if name.replace(".", "__") not in refused]
    return msgspec.structs.replace(found, capabilities=(*found.capabilities, *more))


CUDA = backends.get("cuda")
RECORDED = Strategy(micro_batch=32, graphs="step", attention="sdpa", precision="bf16")


def test_steps_are_recorded_where_the_probe_saw_it(prepared: Prepared) -> None:
    assert build_space(cuda_hardware(), CUDA, prepared[1]).values["graphs"] == ("none", "step")
    unprobed = build_space(factories.hardware(), CUDA, prepared[1])
    assert unprobed.left_out["graphs=step"] == "unknown: not probed"
    assert build_space(cuda_hardware(), CPU, prepared[1]).left_out["graphs=step"] == "not for this kind of device"
    recipe = msgspec.structs.replace(prepared[1].recipe, schedule="onecycle")
    other = build_space(cuda_hardware(), CUDA, prepared[1].with_recipe(recipe))
    assert "changes more than the rate" in other.left_out["graphs=step"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"compile": "default"}, None),
        ({"compile": "default", "checkpoint": "memory_budget"}, None),
        ({"padding": "buckets"}, None),
        ({"padding": "packed"}, None),
        ({"padding": "packed", "compile": "default"}, None),
        ({"micro_batch": 8, "accumulation": 4}, None),
        ({"micro_batch": 8, "accumulation": 4, "padding": "buckets"}, "mix of widths"),
        ({"padding": "packed", "precision": "fp32"}, "length of each sequence"),
        ({"compile": "reduce-overhead"}, "graphs of its own"),
        ({"precision": "fp16"}, "loss scaler"),
        ({"checkpoint": "every_block"}, "random numbers"),
    ],
    ids=str,
)
def test_steps_that_ask_the_device_are_not_recorded(
    prepared: Prepared, changes: dict[str, Any], reason: str | None
) -> None:
    space = build_space(cuda_hardware(), CUDA, prepared[1])
    found = space.refusal(msgspec.structs.replace(RECORDED, **changes))
    assert found is None if reason is None else reason in (found or "")


def test_a_kernel_that_counts_tokens_is_recorded_where_there_is_no_mask(prepared: Prepared) -> None:
    space = build_space(cuda_hardware(), CUDA, prepared[1])
    space = msgspec.structs.replace(space, pairs=space.pairs | {("flash_attn", "bf16")})
    flash = msgspec.structs.replace(RECORDED, attention="flash_attn")
    assert "how many tokens count" in (space.refusal(flash) or "")
    assert msgspec.structs.replace(space, is_masked=False).refusal(flash) is None


def test_a_profile_of_a_recorded_setting_keeps_it_where_it_can(prepared: Prepared) -> None:
    space = build_space(cuda_hardware(), CUDA, prepared[1])
    assert space.nearest(msgspec.structs.replace(RECORDED, prefetch=8), RECORDED).graphs == "step"
    assert space.nearest(msgspec.structs.replace(RECORDED, precision="fp16"), RECORDED).graphs == "none"


def test_all_that_may_be_tried_is_counted(prepared: Prepared) -> None:
    space = build_space(cuda_hardware(), CUDA, prepared[1])
    few: dict[str, tuple[Any, ...]] = {knob: values[:1] for knob, values in space.values.items()}
    few |= {"graphs": ("none", "step"), "padding": ("max", "packed"), "compile": ("none", "default")}
    few |= {"micro_batch": (32,), "precision": ("fp32", "bf16", "fp16"), "attention": ("eager", "sdpa")}
    pairs = frozenset(itertools.product(few["attention"], few["precision"]))
    space = msgspec.structs.replace(space, values=few, pairs=pairs)
    every = [dict(zip(few, chosen, strict=True)) for chosen in itertools.product(*few.values())]
    assert space.size == sum(space.refusal(space.strategy(params)) is None for params in every) > 10


def test_the_guess_on_cuda_is_recorded_unless_it_cannot_be(prepared: Prepared) -> None:
    hardware = cuda_hardware(attention__sdpa_flash__bf16="no", attention__sdpa_flash__fp16="no")
    assert expert_guess(build_space(hardware, CUDA, prepared[1]), hardware, CUDA).graphs == "step"
    hardware = cuda_hardware(matmul__bf16="refused: no", attention__sdpa_flash__fp16="no")
    guess = expert_guess(build_space(hardware, CUDA, prepared[1]), hardware, CUDA)
    assert (guess.precision, guess.graphs) == ("fp16", "none")


def test_the_guess_is_tried_compiled_by_block_where_that_usually_pays(prepared: Prepared) -> None:
    hardware = cuda_hardware()
    space = build_space(hardware, CUDA, prepared[1])
    guess = expert_guess(space, hardware, CUDA)
    assert guess.compile == "none"
    compiled = compiled_guess(space, CUDA, guess)
    assert compiled == msgspec.structs.replace(guess, compile="default", compile_scope="blocks")
    for values in ({"compile_scope": ("model",)}, {"compile": ("none",)}):
        less = msgspec.structs.replace(space, values={**space.values, **values})
        found = compiled_guess(less, CUDA, guess)
        assert (found and found.compile_scope) == (None if "compile" in values else "model")
    hardware = factories.hardware()
    assert compiled_guess(build_space(hardware, CPU, prepared[1]), CPU, guess) is None


def test_packed_rows_are_compiled_where_one_kernel_takes_them(prepared: Prepared) -> None:
    packed = msgspec.structs.replace(RECORDED, padding="packed", graphs="none", compile="default")
    assert build_space(cuda_hardware(), CUDA, prepared[1]).refusal(packed) is None
    assert build_space(cuda_hardware(packed__bf16="refused: no"), CUDA, prepared[1]).refusal(packed)


def test_the_sampler_never_proposes_what_the_space_refuses(prepared: Prepared) -> None:
    space = build_space(factories.hardware(attention__sdpa_flash__bf16="no"), CPU, prepared[1])
    sampler = Sampler(space, optuna.create_study(), seed=0)
    for _ in range(60):
        proposal = sampler.ask()
        assert proposal is not None
        assert space.refusal(proposal.strategy) is None
        sampler.tell(1.0)


def test_the_guess_takes_the_fastest_that_the_probe_measured(prepared: Prepared) -> None:
    hardware = factories.hardware(matmul__bf16="refused: no", attention__sdpa_flash__fp16="refused: no")
    guess = expert_guess(build_space(hardware, CPU, prepared[1]), hardware, CPU)
    assert (guess.precision, guess.attention) == ("fp16", "sdpa")


@pytest.mark.parametrize(
    ("laps", "rate", "is_compiled", "is_hopeless"),
    [
        (1, 1.0, False, False),
        (2, 4.0, False, True),
        (2, 7.0, False, False),
        (3, 7.0, False, True),
        (3, 9.0, False, False),
        (3, 1.0, True, False),
        (4, 1.0, True, True),
    ],
)
def test_a_trial_is_given_up_only_when_far_behind(laps: int, rate: float, is_compiled: bool, is_hopeless: bool) -> None:
    progress = Progress(stage="timing", num_laps=laps, samples_per_s=rate)
    assert (hopeless(progress, 10.0, is_compiled) is not None) == is_hopeless


def test_the_loss_is_the_planned_run_or_the_peak() -> None:
    planned = PlannedRun(num_train=1000, num_test=300, epochs=2)
    trial = factories.trial(measurement=factories.measurement(10.0, warm_up_s=7.0))
    assert loss_of(trial, FASTEST, planned) == pytest.approx(7 + 2 * (100 + 10))
    assert loss_of(trial, LEANEST, planned) == GIB
    assert loss_of(trial, BALANCED, planned) == pytest.approx((GIB * (7 + 2 * (100 + 10))) ** 0.5)
    assert loss_of(trial, THRIFTIEST, planned) is None, "no counter"
    counted = msgspec.structs.replace(trial.measurement, joules_per_sample=3.0)  # type: ignore[type-var]
    drew = msgspec.structs.replace(trial, measurement=counted)
    assert loss_of(drew, THRIFTIEST, planned) == 3 * 2 * planned.num_train
    pruned = factories.trial(outcome="pruned", measurement=None, samples_per_s=5.0)
    assert loss_of(pruned, FASTEST, planned, reference=trial) == pytest.approx(2 * (7 + 2 * (100 + 10)))
    assert loss_of(pruned, LEANEST, planned, reference=trial) is None


def test_two_trials_of_a_kind_predict_the_others_peak() -> None:
    model = MemoryModel()

    def sized(micro_batch: int, peak_bytes: int) -> Trial:
        strategy = Strategy(micro_batch=micro_batch, accumulation=32 // micro_batch)
        return factories.trial(strategy=strategy, measurement=factories.measurement(peak_memory_bytes=peak_bytes))

    assert model.predict(sized(8, 0).strategy) is None
    model.learn(sized(1, 150))
    model.learn(sized(2, 200))
    assert model.predict(sized(32, 0).strategy) == pytest.approx(100 + 50 * 32, abs=1)
    assert model.is_over(sized(32, 0).strategy, 1000)
    assert not model.is_over(sized(16, 0).strategy, 1000)
    assert model.predict(Strategy(micro_batch=32, precision="bf16")) is None


def test_what_is_unlikely_to_fit_is_not_tried() -> None:
    """Nor, once two of its kind were, what is less than sure to."""

    def tried(size: int, mib: int | None, padding: Padding = "max") -> Trial:
        strategy = Strategy(micro_batch=size, accumulation=32 // size, padding=padding)
        if mib is None:
            return factories.trial(size, strategy, outcome="oom", measurement=None)
        return factories.trial(size, strategy, measurement=factories.measurement(5.0, peak_memory_bytes=mib * 2**20))

    def chance(strategy: Strategy, *trials: Trial) -> float:
        model = MemoryModel()
        for trial in trials:
            model.learn(trial)
        values = {"micro_batch": (4, 8, 16, 32), "padding": ("max", "longest", "buckets")}
        return Fit(model, values, trials, 1000 * 2**20).chances([strategy])[0]

    plain, small = tried(32, 4000), tried(16, None).strategy
    assert chance(small) == 1.0
    assert 0 < chance(small, plain) < chance(tried(4, None).strategy, plain) < 1
    assert chance(tried(32, None, "longest").strategy, plain, tried(16, 2000), tried(8, None, "buckets")) < 0.3
    close = [tried(4, 522), tried(8, 740)]
    assert chance(tried(16, None).strategy, *close) == 0  # the line says 1,176
    assert chance(tried(16, None).strategy, tried(4, 300), tried(8, 400)) > 0.9
    nearly = [tried(4, 522), tried(8, 670)]
    assert chance(tried(16, None).strategy, *nearly) == 0  # 966 of 1,000: the line bends
    assert chance(tried(8, None).strategy, plain, tried(16, None)) == 0  # two of its kind say too little
