"""DeepSpeed's autotuner with its defaults, on its CPU accelerator: micro batch and accumulation, by experiments that
its launcher starts. It ends each by ssh through pdsh, which one machine does not need: a stand-in does nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import common

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0},
    "autotuning": {"enabled": True, "arg_mappings": {}, "max_train_batch_size": 128},
}
"""Left to itself it begins with a micro batch of 198, 20 s a step here; 128 is what accelerate begins with."""


def main() -> None:
    workload = common.workload()
    clock = common.Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        stand_in = folder / "bin" / "pdsh"
        stand_in.parent.mkdir()
        stand_in.write_text("#!/bin/sh\n")
        stand_in.chmod(0o755)
        path = os.pathsep.join([str(Path(sys.executable).parent), str(stand_in.parent), os.environ["PATH"]])
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [
                *("deepspeed", "--autotuning", "tune", "--num_gpus", "1"),
                *(
                    str(Path(__file__).with_name("train_deepspeed.py")),
                    "--deepspeed_config",
                    str(folder / "config.json"),
                ),
            ],
            cwd=folder,
            env={**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(root)},
            stdout=sys.stderr,
            check=False,
        )
        found = folder / "autotuning_results" / "ds_config_optimal.json"
        if not found.is_file():
            sys.exit(f"deepspeed --autotuning ended with status {done.returncode} and without a result")
        best = json.loads(found.read_text())
    size, accumulation = best["train_micro_batch_size_per_gpu"], best.get("gradient_accumulation_steps", 1)
    clock.report(
        f"micro batch {size}, {accumulation} accumulated, for {workload.name}",
        micro_batch=size,
        accumulation=accumulation,
    )


if __name__ == "__main__":
    main()
