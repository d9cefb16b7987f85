"""One setting of every knob. Says what the values are; not which of them a device can run (search.space)."""

from typing import Any, Literal

import msgspec

Attention = Literal["eager", "sdpa", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Checkpoint = Literal["none", "every_4th", "every_2nd", "every_block"]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]
Padding = Literal["max", "longest", "buckets"]
Allocator = Literal["default", "retain"]


class Strategy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting of every knob; the defaults are the plain baseline.

    The optimizer sees ``micro_batch * accumulation`` samples a step: that is the recipe's global batch.
    """

    attention: Attention = "eager"
    """``eager``: written out (matmul, softmax, matmul). ``sdpa``: torch's own choice of kernel. ``sdpa_*``: one
    kernel of ``scaled_dot_product_attention`` pinned."""
    precision: Precision = "fp32"
    """fp32 with TF32 off; tf32: fp32 storage, TF32 matmuls; bf16, fp16: autocast, fp16 with a GradScaler."""
    checkpoint: Checkpoint = "none"
    """Which transformer blocks are recomputed in the backward pass."""
    micro_batch: int
    """Samples in one forward and backward pass."""
    accumulation: int = 1
    """Micro batches whose gradients are summed before an optimizer step."""
    compile: Compile = "none"
    """torch.compile's mode for the whole model."""
    workers: int = 0
    """Loader processes; 0 loads in the training process."""
    padding: Padding = "max"
    """``max``: every sequence to the model's limit. ``longest``: to the longest of its micro batch, the global batch
    sorted by length before it is cut up. ``buckets``: whole batches of similar length, in random order."""
    allocator: Allocator = "default"
    """``retain``: on a CPU, freed memory is kept by the process instead of going back to the kernel, which would have
    to clear every page of it again for the next batch."""

    def __post_init__(self) -> None:
        for knob in ("micro_batch", "accumulation"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be >= 1, got {getattr(self, knob)}")
        if self.workers < 0:
            raise ValueError(f"workers must be >= 0, got {self.workers}")

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step."""
        return self.micro_batch * self.accumulation

    def changed(self, other: "Strategy") -> dict[str, tuple[Any, Any]]:
        """Knobs whose value differs, as ``{knob: (own, other's)}``, in the order of declaration."""
        return {
            knob: (getattr(self, knob), getattr(other, knob))
            for knob in self.__struct_fields__
            if getattr(self, knob) != getattr(other, knob)
        }

    def to_dict(self) -> dict[str, str | int]:
        """Plain values in the order of declaration, as stored in profiles and in JSON."""
        return {knob: getattr(self, knob) for knob in self.__struct_fields__}


def baseline(global_batch: int) -> Strategy:
    """The plain setting everything is compared with: fp32, attention written out, one micro batch, padded to max."""
    return Strategy(micro_batch=global_batch)
