"""One setting of every knob. Says what the values are; not which of them a device can run (search.space)."""

from typing import Any, Literal, get_args, get_type_hints

import msgspec

Attention = Literal[
    "eager",
    "sdpa",
    "sdpa_math",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "flash_attn",
    "window",
    "window_global",
    "window_global_random",
]
Precision = Literal["fp32", "tf32", "bf16", "fp16", "bf16_weights", "fp8"]
Checkpoint = Literal["none", "memory_budget", "selective", "every_4th", "every_2nd", "every_block"]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]
Padding = Literal["max", "longest", "buckets", "packed"]
Allocator = Literal["default", "retain"]
Optimizer = Literal["default", "foreach", "fused"]
CompileScope = Literal["model", "blocks"]
Graphs = Literal["none", "step"]
MemoryFormat = Literal["contiguous", "channels_last"]

SPARSE: tuple[Attention, ...] = ("window", "window_global", "window_global_random")
"""Attention to part of the keys."""
WINDOW = 64
"""Tokens of a block in windowed attention, where nothing else is asked for."""
APPROXIMATE: dict[str, frozenset[str]] = {
    "attention": frozenset(SPARSE),
    "precision": frozenset({"bf16_weights", "fp8"}),
}
"""By knob, the values that change what is trained, not only how fast: searched where the user allows it."""


PREFETCH = 2
"""Batches that a loader process has ready, torch's default."""


MAX_PROCESSES = 1024
"""Loader processes or threads: more are a slip of the pen, and would take the machine down."""


class Strategy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting of every knob; the defaults are the plain baseline.

    The optimizer sees ``micro_batch * accumulation`` samples a step: that is the recipe's global batch.
    """

    attention: Attention = "eager"
    """``eager``: written out (matmul, softmax, matmul). ``sdpa``: torch's own choice of kernel. ``sdpa_*``: one
    kernel of ``scaled_dot_product_attention`` pinned. ``flash_attn``: the flash-attn packages' kernel, on the tokens
    that count alone, models/flash.py. ``window*`` (approximate): part of the keys, models/sparse.py."""
    precision: Precision = "fp32"
    """fp32 with TF32 off; tf32: fp32 storage, TF32 matmuls; bf16, fp16: autocast, fp16 with a GradScaler;
    ``bf16_weights`` (approximate): weights, gradients and the optimizer's state in bf16, no autocast; ``fp8``
    (approximate): bf16, and linear layers' matrix products in 8 bits, models/fp8.py."""
    checkpoint: Checkpoint = "none"
    """Which repeated blocks are recomputed in the backward pass; ``selective``: all of them, but for the results of
    their matrix products and of torch's attention kernels, which are kept; ``memory_budget``: the compiler chooses, to
    keep half of the activations' memory."""
    micro_batch: int
    """Samples in one forward and backward pass."""
    accumulation: int = 1
    """Micro batches whose gradients are summed before an optimizer step."""
    compile: Compile = "none"
    """torch.compile's mode."""
    compile_scope: CompileScope = "model"
    """What is compiled: the whole ``model``, or each of its repeated ``blocks``, which share one compilation."""
    graphs: Graphs = "none"
    """``step``: on CUDA, the whole optimizer step is recorded as a graph, for each shape of batch, and replayed with a
    single launch, graphs.py."""
    workers: int = 0
    """Loader processes; 0 loads in the training process."""
    prefetch: int = PREFETCH
    """Batches that each loader process has ready."""
    padding: Padding = "max"
    """``max``: every sequence to the model's limit. ``longest``: to the longest of its micro batch, the global batch
    sorted by length before it is cut up. ``buckets``: whole batches of similar length, in random order. ``packed``: no
    padding, a micro batch's sequences in one row, each attending to itself only."""
    threads: int = 0
    """Threads that one operation is spread over on a CPU; 0 is torch's own choice, every core."""
    allocator: Allocator = "default"
    """``retain``: on a CPU, freed memory is kept by the process instead of going back to the kernel, which would have
    to clear every page of it again for the next batch."""
    optimizer: Optimizer = "default"
    """How the optimizer's arithmetic is run: torch's own choice, ``foreach`` a few kernels over all parameters at once,
    ``fused`` one kernel for the whole update."""
    memory_format: MemoryFormat = "contiguous"
    """How the four dimensions of images and of convolutions' weights lie in memory."""
    window: int = WINDOW
    """Tokens of a block in ``window*`` attention, and how far back a causal query sees there; never searched, as every
    value trains something else."""
    deterministic: bool = False
    """Only algorithms that give the same result every time: a constraint that the user sets, never searched."""

    def __post_init__(self) -> None:
        for knob in ("micro_batch", "accumulation", "prefetch", "window"):
            if getattr(self, knob) < 1:
                raise ValueError(f"{knob} must be >= 1, got {getattr(self, knob)}")
        for knob in ("workers", "threads"):
            if not 0 <= getattr(self, knob) <= MAX_PROCESSES:
                raise ValueError(f"{knob} must be from 0 to {MAX_PROCESSES}, got {getattr(self, knob)}")

    @property
    def is_approximate(self) -> bool:
        """Whether it trains something else than the baseline does."""
        return any(getattr(self, knob) in values for knob, values in APPROXIMATE.items())

    @property
    def idle(self) -> dict[str, str]:
        """Knobs whose value is not the plain one and does nothing beside the others', each with the reason."""
        found = {}
        if self.compile == "none":
            if self.compile_scope != "model":
                found["compile_scope"] = "nothing is compiled"
            if self.checkpoint == "memory_budget":
                found["checkpoint"] = "nothing is compiled"
        if self.workers == 0 and self.prefetch != PREFETCH:
            found["prefetch"] = "nothing is fetched ahead without loader processes"
        if self.attention not in SPARSE and self.window != WINDOW:
            found["window"] = f"attention {self.attention} is to all keys"
        return found

    @property
    def compiles_graphs(self) -> bool:
        """Whether compilation may replay CUDA graphs, which reuse the memory of one call in the next."""
        return self.compile in ("reduce-overhead", "max-autotune")

    @property
    def records_shapes(self) -> bool:
        """Whether something is recorded for each shape of batch, and takes a while the first times it comes up."""
        return self.compiles_graphs or self.graphs == "step"

    @property
    def unrecorded(self) -> str | None:
        """Why no step of this setting can be recorded as a graph, on any device; None where one can."""
        if self.compiles_graphs:
            return "the compiler records graphs of its own"
        if self.precision == "fp16":
            return "fp16's loss scaler asks the device after every step"
        if self.checkpoint not in ("none", "memory_budget"):
            return "what is recomputed sets back the random numbers, which a recorded step cannot"
        if self.accumulation > 1 and self.padding != "max":
            return "with accumulation every mix of widths would be recorded anew"
        return None

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

    def to_dict(self) -> dict[str, str | int | bool]:
        """Plain values in the order of declaration, as stored in profiles and in JSON."""
        return {knob: getattr(self, knob) for knob in self.__struct_fields__}


def baseline(global_batch: int) -> Strategy:
    """The plain setting everything is compared with: fp32, attention written out, one micro batch, padded to max."""
    return Strategy(micro_batch=global_batch)


def choices(field: str, owner: type = Strategy) -> str:
    """``; it is one of none, step`` for a knob whose values have names, nothing for others: an error's end. ``owner``
    is what else may have such a field."""
    values = [value for value in get_args(get_type_hints(owner).get(field)) if isinstance(value, str)]
    return f"; it is one of {', '.join(values)}" if values else ""
