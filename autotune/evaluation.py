"""Mean loss and correct answers on batches that are not trained on, launched from Python or recorded as steps are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from autotune.data.batching import MicroBatch
from autotune.step import Step, in_fp32
from autotune.workloads.base import CrossEntropy, Workload
from autotune.workloads.seen import evaluating

Counted = tuple[Tensor, Tensor]
"""Sum of the losses and number of correct answers, scalars on the device."""


class Evaluation:
    """Takes batches with the model in evaluation mode.

    Where steps are recorded, forward pass, loss and answers are, too, for each shape of batch; hooks of modules are not
    called then. A model that in evaluation mode waits for the device, or draws random numbers on the host, is launched.
    """

    def __init__(self, step: Step, workload: Workload) -> None:
        self._step, self._workload = step, workload
        # without what only training has
        self._loss = CrossEntropy() if isinstance(step.plain_loss, CrossEntropy) else step.plain_loss
        self._graphs = None if step.graphs is None else step.graphs.beside(self._launched)
        self._num_seen = 0
        self._places: list[int] = []
        self.launched_because = ""
        """Why it is not recorded, though steps are."""

    @property
    def num_recorded(self) -> int:
        """Shapes that are recorded."""
        return 0 if self._graphs is None else len(self._graphs.recorded)

    def __call__(self, batches: Iterable[Sequence[MicroBatch]]) -> tuple[float, float]:
        """Mean loss and share classified correctly; where samples have no class, the share is no number; nor is the
        loss where there are none."""
        loss_sum, num_correct = (torch.zeros((), device=self._step.device) for _ in range(2))
        num_samples = 0
        with evaluating(self._step.model):
            self._find_weights()
            for batch in batches:
                for micro in batch:
                    loss, correct = self._counted(micro)
                    loss_sum += loss
                    num_correct += correct
                    num_samples += micro.num_samples
        if not num_samples:
            return math.nan, math.nan
        accuracy = float(num_correct) / num_samples if self._workload.num_correct is not None else math.nan
        return float(loss_sum) / num_samples, accuracy

    def _counted(self, micro: MicroBatch) -> Counted:
        """The first batch has kernels chosen and compiled; whether a model can be recorded the second one tells."""
        self._num_seen += 1
        if self._graphs is None or self._num_seen == 1:
            return self._launched([micro])
        if self._num_seen > 2:
            return self._graphs([micro])
        counted, self.launched_because = self._graphs.tried([micro])
        if self.launched_because:
            self._graphs = None
        return counted

    def _launched(self, batch: Sequence[MicroBatch]) -> Counted:
        output, micro = self._step.forward_only(*batch)
        counts = self._workload.num_correct
        correct = torch.zeros((), device=self._step.device) if counts is None else counts(in_fp32(output, True), micro)
        return self._loss(output, micro.targets), correct

    def _find_weights(self) -> None:
        """A replay reads them where they lay: with other weights in their place (``load_state_dict(assign=True)``, an
        average that is swapped in) every shape is recorded anew."""
        model = self._step.model
        places = [tensor.data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())]
        if self._graphs is not None and places != self._places:
            self._graphs.forget()
        self._places = places
