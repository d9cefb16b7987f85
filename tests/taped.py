"""A recording without a card: every operator is noted while it runs, and a replay runs them again on the same memory.
What the host did in between is left out, as on a card, and operators that wait for the device are errors. Only a card
tells whether kernels can be recorded, what is copied from the host, also by ``tolist`` and ``numpy``, what the device
draws, and whether memory is used again that something still reads.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")


class Notes(TorchDispatchMode):
    """Of what runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = operator.name() == "aten::index.Tensor" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or operator.name() in WAITS:
            raise RuntimeError(f"{operator.name()} is not permitted when the stream is capturing")
        result = operator(*args, **(kwargs or {}))
        self._noted.append((operator, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Everything again, with the same numbers from the host."""
        for operator, args, kwargs, result in self._noted:
            for before, now in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(before, Tensor) and before.data_ptr() != now.data_ptr():
                    before.detach().copy_(now)


class Graph:
    """What was noted has run once: here the first replay has nothing left to do."""

    def __init__(self) -> None:
        self.notes = Notes()
        self._has_run = True

    def replay(self) -> None:
        if not self._has_run:
            self.notes.replay()
        self._has_run = False


class Stream:
    """The only one."""

    device = torch.device("cpu")

    def wait_stream(self, other: object) -> None:
        """Nothing is ever under way."""


class Tape:
    """Stands in for torch.cuda; ``set_up`` takes monkeypatch.setattr."""

    def __init__(self) -> None:
        self._is_recording = False
        self._sync_debug_mode: str | int = 0

    def set_up(self, setattr_: Callable[..., None]) -> None:
        scripted = {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": self._record,
            "stream": lambda _: self._launch(),
            "current_stream": Stream,
            "graph_pool_handle": object,
            "set_stream": lambda _: None,
            "synchronize": lambda: None,
            "is_current_stream_capturing": lambda: self._is_recording,
            "get_sync_debug_mode": lambda: self._sync_debug_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "_sync_debug_mode", mode),
        }
        for name, value in scripted.items():
            setattr_(torch.cuda, name, value)
        # an optimizer that can be recorded asks where its parameters lie
        for name, module in list(sys.modules.items()):
            if name.startswith("torch.optim.") and hasattr(module, "_get_capturable_supported_devices"):
                setattr_(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])

    @contextlib.contextmanager
    def _record(self, graph: Graph, **_: object) -> Iterator[None]:
        self._is_recording = True
        try:
            with graph.notes:
                yield
        finally:
            self._is_recording = False

    def _launch(self) -> contextlib.AbstractContextManager[Any]:
        return Notes() if self._sync_debug_mode == "error" else contextlib.nullcontext()
