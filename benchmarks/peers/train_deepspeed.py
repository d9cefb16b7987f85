"""The training script that DeepSpeed's autotuner runs."""

from __future__ import annotations

import argparse

import deepspeed

from benchmarks.peers import common

STEPS = 20


def main() -> None:
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    common.limit_memory()
    workload = common.workload()
    model = common.Classifier(workload)
    engine, _, batches, _ = deepspeed.initialize(
        args=arguments,
        model=model,
        optimizer=common.adamw(model, workload),
        training_data=list(range(workload.num_train)),
        collate_fn=common.Batches(workload),
    )
    for _, batch in zip(range(STEPS * engine.gradient_accumulation_steps()), batches, strict=False):
        engine.backward(engine(**batch)["loss"])
        engine.step()


if __name__ == "__main__":
    main()
