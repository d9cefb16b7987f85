"""Hugging Face's Trainer with auto_find_batch_size, from the recipe's batch size: shrinks it until a step runs."""

from __future__ import annotations

import tempfile

from transformers import Trainer, TrainingArguments

from benchmarks.peers import common


def main() -> None:
    common.limit_memory()
    workload = common.workload()
    clock = common.Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=workload.recipe.global_batch,
            auto_find_batch_size=True,
            max_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=common.Classifier(workload),
            args=arguments,
            train_dataset=range(workload.num_train),
            data_collator=common.Batches(workload),
        )
        trainer.train()
        size = trainer._train_batch_size
    clock.report(f"batch size {size}", micro_batch=size)


if __name__ == "__main__":
    main()
