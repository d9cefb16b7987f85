"""Random numbers under control: which operators draw, and what they give, for a pass through a model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Place = tuple[int, int]
"""The dimension that samples lie in, and how many rows of it each has."""


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that draws; by itself it lets them draw, and keeps the shape that each draws for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes other operators on."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **kwargs)
        self.shapes.append(_shape(args))
        return self.draw(function, args, kwargs)

    def draw(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What the operator gives."""
        return function(*args, **kwargs)

    def seed(self, sample: int = 0) -> None:
        """For the operator that draws now: another for each, and for each sample."""
        torch.default_generator.manual_seed(1000 * len(self.shapes) + sample)


class BySample(Draws):  # type: ignore[no-untyped-call]
    """Each sample draws the same numbers whatever samples are beside it: an operator is run for each sample's rows by
    themselves. What is drawn for all samples at once (a mask of weights, ``randperm``) is the same for the same shape.
    """

    def __init__(self, samples: Sequence[int], places: Sequence[Place | None]) -> None:
        super().__init__()
        self._samples, self._places = samples, places

    def draw(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What the samples draw, joined."""
        index = len(self.shapes) - 1
        place = self._places[index] if index < len(self._places) else None
        if place is None or "out" in kwargs:
            self.seed()
            return function(*args, **kwargs)
        dim, rows = place
        whole, found = self.shapes[-1], []

        def own(value: Any, start: int) -> Any:
            if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == whole[dim]:
                return value.narrow(dim, start, rows)
            is_size = isinstance(value, Sequence) and tuple(value) == whole
            return [*whole[:dim], rows, *whole[dim + 1 :]] if is_size else value

        for start, sample in zip(itertools.count(0, rows), self._samples, strict=False):
            self.seed(sample)
            own_kwargs = {name: own(value, start) for name, value in kwargs.items()}
            found.append(function(*(own(value, start) for value in args), **own_kwargs))
        if any(result.alias_info is not None for result in function._schema.returns):  # written in place
            return args[0]
        if isinstance(found[0], tuple):
            return tuple(_joined(parts, dim) for parts in zip(*found, strict=True))
        return _joined(found, dim)


class Constant(Draws):  # type: ignore[no-untyped-call]
    """Every operator gives one number all over, so that it does not matter for what shape it draws."""

    def draw(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The largest of what is drawn: of dropout's mask, that it keeps."""
        self.seed()
        found = function(*args, **kwargs)
        if isinstance(found, Tensor) and found.numel():
            with torch.no_grad():
                found.fill_(found.max())
        return found


def places(
    whole: Sequence[tuple[int, ...]], part: Sequence[tuple[int, ...]], num: int, num_part: int
) -> list[Place | None]:
    """For each operator that drew for a batch of ``num`` samples, and for a part of ``num_part``, where its samples
    lie; None where it drew for the same shape, or where the shapes do not tell."""
    return [_place(own, other, num, num_part) for own, other in zip(whole, part, strict=False)]


def _place(whole: tuple[int, ...], part: tuple[int, ...], num: int, num_part: int) -> Place | None:
    if len(whole) != len(part):
        return None
    (dim, *others) = [dim for dim, (own, other) in enumerate(zip(whole, part, strict=True)) if own != other] or (None,)
    if dim is None or others or whole[dim] % num or part[dim] != whole[dim] // num * num_part:
        return None
    return dim, whole[dim] // num


def _shape(args: Sequence[Any]) -> tuple[int, ...]:
    """Of the first tensor, or the size that is asked for."""
    for value in args:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        if isinstance(value, Sequence) and all(isinstance(size, int) for size in value):
            return tuple(value)
    return ()


def _joined(parts: Sequence[Any], dim: int) -> Any:
    return torch.cat(list(parts), dim) if isinstance(parts[0], Tensor) and parts[0].dim() > dim else parts[0]
