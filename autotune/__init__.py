"""Hardware-adaptive auto-tuning of PyTorch training: the same training, faster.

import autotune
tuned = autotune.load("imdb")
run = tuned.apply()
for batch in run.loader: loss = run.step(batch)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.api import Tuned, load

__version__ = "0.1.0"
__all__ = ["Tuned", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """``load`` and ``Tuned`` on first use: importing autotune imports neither torch nor optuna."""
    if name in ("Tuned", "load"):
        from autotune import api

        return getattr(api, name)
    raise AttributeError(f"module 'autotune' has no attribute {name!r}")
