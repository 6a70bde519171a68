"""Rows of several arrays as one, without those that are deleted: what is left is numbered from 0 on, in order.

The arrays stay where they are, such as in memory-mapped files. A range of rows is a part of one of them, without a
copy, unless a deleted row or the end of an array is in it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from atlas.files.left_over import LeftOver


class LiveRows:
    """Rows `(n, width)` of several arrays, as far as a search and a copy need a tensor. Read-only, on the CPU."""

    device, ndim = torch.device("cpu"), 2

    def __init__(self, arrays: Sequence[torch.Tensor], deleted: Sequence[np.ndarray]) -> None:
        """Args:
        arrays: `(m, width)` each, one after the other.
        deleted: for each array the numbers of its rows that are left out, ascending.
        """
        self._arrays, self._left = arrays, [LeftOver(rows) for rows in deleted]
        sizes = [len(array) - len(rows) for array, rows in zip(arrays, deleted, strict=True)]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self.shape, self.dtype = torch.Size((int(self._ends[-1]), arrays[0].shape[1])), arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """The rows of a slice without a step."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"rows are read one after the other, not every {step}")
        first = int(np.searchsorted(self._ends, start, side="right"))
        behind = int(np.searchsorted(self._starts, stop, side="left"))
        parts = [self._part(number, start, stop) for number in range(first, behind)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else self.new_empty((0, self.shape[1]))

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        """The rows with these numbers, `(m,) int64 -> (m, width)`; `dim` is 0."""
        assert dim == 0
        numbers = rows.numpy()
        found = self.new_empty((len(numbers), self.shape[1]))
        of_array = np.searchsorted(self._ends, numbers, side="right")
        for number in np.unique(of_array):
            (places,) = np.nonzero(of_array == number)
            inside = self._left[number].among_all(numbers[places] - self._starts[number])
            found[torch.from_numpy(places)] = self._arrays[number].index_select(0, torch.from_numpy(inside))
        return found

    def new_empty(self, size: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._arrays[0].new_empty(size, dtype=dtype or self.dtype)

    def element_size(self) -> int:
        return self._arrays[0].element_size()

    def _part(self, number: int, start: int, stop: int) -> torch.Tensor:
        """What lies in one array of the rows from start to stop."""
        array, left, first = self._arrays[number], self._left[number], int(self._starts[number])
        rows = range(max(start - first, 0), min(stop, int(self._ends[number])) - first)
        everything = left.range_among_all(rows)
        if len(everything) == len(rows):
            return array[everything.start : everything.stop]
        return array.index_select(0, torch.from_numpy(left.among_all(np.arange(rows.start, rows.stop))))


def joined(arrays: Sequence[torch.Tensor], deleted: Sequence[np.ndarray]) -> torch.Tensor | LiveRows:
    """The rows of all arrays without those that are deleted: one array as it is, where it has them all."""
    parts = [part for part in zip(arrays, deleted, strict=True) if len(part[0])]
    if not parts:
        return arrays[0]
    if len(parts) == 1 and not len(parts[0][1]):
        return parts[0][0]
    return LiveRows(*zip(*parts, strict=True))
