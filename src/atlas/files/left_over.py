"""Rows of which some are left out: those behind them move up."""

import numpy as np


class LeftOver:
    """The numbers of what is left when some rows are deleted."""

    def __init__(self, deleted: np.ndarray) -> None:
        """`deleted`: numbers of rows, ascending."""
        self._left_before = deleted - np.arange(len(deleted))  # by each, how many are left before it

    def among_all(self, rows: np.ndarray | int) -> np.ndarray:
        """Numbers among those that are left -> numbers among all."""
        return rows + np.searchsorted(self._left_before, rows, side="right")

    def range_among_all(self, rows: range) -> range:
        """The shortest range of all that has these."""
        return range(int(self.among_all(rows.start)), int(self.among_all(rows.stop - 1)) + 1) if rows else range(0)
