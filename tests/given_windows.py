"""Calibration windows that a test gives, in place of those that a cell draws."""

from torch import Tensor


class GivenWindows:
    """Windows shared with nobody; ``asked`` lists how many were asked for, request by request."""

    def __init__(self, windows: Tensor) -> None:
        self._windows, self.asked = windows, list[int | None]()

    def windows(self, n_samples: int | None = None) -> Tensor:
        self.asked.append(n_samples)
        return self._windows[:n_samples]

    def shelf(self, n_samples: int) -> None:
        return None
