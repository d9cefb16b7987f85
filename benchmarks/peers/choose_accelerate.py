"""accelerate's find_executable_batch_size, from its own starting size: halves until a step runs."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from benchmarks.peers import common


def main() -> None:
    common.limit_memory()
    workload = common.workload()
    clock = common.Clock()
    accelerator = Accelerator(cpu=True)

    @find_executable_batch_size()  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> int:
        model = common.Classifier(workload)
        model, optimizer, batches = accelerator.prepare(
            model, common.adamw(model, workload), common.loader(workload, batch_size)
        )
        loss = model(**next(iter(batches)))["loss"]
        accelerator.backward(loss)
        optimizer.step()
        return batch_size

    size = train()
    clock.report(f"batch size {size}", micro_batch=size)


if __name__ == "__main__":
    main()
