"""The axes of a reshape."""

from __future__ import annotations

from collections.abc import Sequence

AxisGroups = list[tuple[tuple[int, ...], tuple[int, ...]]]  # [(input axes, output axes), ...]


def reshape_groups(before: Sequence[int], after: Sequence[int]) -> AxisGroups:
    """Splits a reshape into the smallest runs of input and output axes with equal numbers of elements."""
    if 0 in before or 0 in after:
        return [(tuple(range(len(before))), tuple(range(len(after))))]
    groups, i, o = [], 0, 0
    while i < len(before) or o < len(after):
        ins, outs = [], []
        left, right = 1, 1
        while True:
            if i < len(before) and (left <= right or o >= len(after)):
                ins.append(i)
                left *= before[i]
                i += 1
            elif o < len(after):
                outs.append(o)
                right *= after[o]
                o += 1
            if left == right and ((ins and outs) or (i >= len(before) and o >= len(after)) or left == 1):
                break
        groups.append((tuple(ins), tuple(outs)))
    return groups
