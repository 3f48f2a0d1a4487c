"""Positions of the windows of convolutions and pooling along one axis."""

from __future__ import annotations

import numpy as np


def window_count(length: int, window: int, stride: int, dilation: int = 1) -> int:
    """The number of positions of a window along an axis.

    Args:
      length: The length of the axis, with padding.
      window: The number of elements of the window.
      stride: The distance of neighbouring positions.
      dilation: The distance of neighbouring elements of the window.
    """
    return max(0, (length - ((window - 1) * dilation + 1)) // stride + 1)


def positions_read(
    size: int, window: int, stride: int, padding: tuple[int, int], spread: int, dilation: int
) -> np.ndarray:
    """The input position that each output position reads at each window position.

    Args:
      size: The number of input positions.
      window: The number of window positions.
      stride: The distance of the windows of neighbouring output positions.
      padding: The numbers of positions before and after the input.
      spread: The distance of neighbouring input positions, the dilation of the input.
      dilation: The distance of neighbouring window positions, the dilation of the window.

    Returns:
      An array [output positions, window positions] of int. -1 marks the padding and the gaps between input positions.
    """
    low, high = padding
    count = window_count(low + high + ((size - 1) * spread + 1 if size else 0), window, stride, dilation)
    place = np.arange(count)[:, None] * stride + np.arange(window) * dilation - low
    is_input = (place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)
    return np.where(is_input, place // spread, -1)
