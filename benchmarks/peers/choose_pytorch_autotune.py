"""pytorch-autotune 2.0 with its balanced budget, told that the device is the CPU: it would look for CUDA by itself."""

from __future__ import annotations

from pytorch_autotune import autotune

from benchmarks.peers import common

PRECISIONS = {"fp32_default": "fp32", "tf32": "tf32", "amp_bf16": "bf16", "amp_fp16": "fp16"}


class Output(dict[str, object]):
    """What it asks of a model's output: the loss as an attribute."""

    @property
    def loss(self) -> object:
        return self["loss"]


class Classifier(common.Classifier):
    def forward(self, **inputs: object) -> Output:  # type: ignore[override]
        return Output(super().forward(**inputs))  # type: ignore[arg-type]


def main() -> None:
    common.limit_memory()
    workload = common.workload()
    batch = next(iter(common.loader(workload, workload.recipe.global_batch)))
    clock = common.Clock()
    result = autotune(Classifier(workload), batch, optimizer="adamw", budget="balanced", device="cpu", cache=False)
    chosen = result.config
    compiled = {} if chosen.compile == "off" else {"compile": chosen.compile}
    fused = {"optimizer": "fused"} if chosen.fused_opt else {}
    clock.report(chosen.label, precision=PRECISIONS[chosen.precision], **compiled, **fused)


if __name__ == "__main__":
    main()
