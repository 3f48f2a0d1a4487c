"""The plan of a conversion: which arrays become variational, with which groups, and why the others stay plain."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """The plan for one array of the params.

    Attributes:
      path: The path of the array, joined by "/".
      shape: Its shape.
      family: The name of its family of priors, or None if it stays plain.
      groups: The number of its groups; 0 if it stays plain.
      groups_of: The kind of its groups, or None: the inputs of a matrix product, the output channels of a convolution, or the columns of a
        table whose rows the network looks up.
      held_by: The path of the kernel whose posterior holds it, or None: a bias, or a part of a batch norm.
      reason: The reason why it stays plain, or None.
    """

    path: str
    shape: tuple[int, ...]
    family: str | None = None
    groups: int = 0
    groups_of: Literal["inputs", "output channels", "columns"] | None = None
    held_by: str | None = None
    reason: str | None = None

    @property
    def is_variational(self) -> bool:
        """Whether the array becomes variational."""
        return self.family is not None or self.held_by is not None

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape)) or "scalar"
        if self.held_by is not None:
            return f"{self.path}  {size}: belongs to {self.held_by}"
        if self.family is None:
            return f"{self.path}  {size}: stays plain, since {self.reason}"
        return f"{self.path}  {size}: {self.family}, a group for each of {self.groups:,} {self.groups_of}"


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """The plan of ``variational``. ``print(model.plan)`` shows it.

    Attributes:
      leaves: The plan for each array, in the order of ``jax.tree.leaves(params)``.
      kl_divergence: The KL divergence of all posteriors at the start, in nats. Its share in the loss of an example is this number divided by
        the number of training examples.
      remark: A sentence on the batch sizes that the given network supports and the converted network does not, or None.
    """

    leaves: tuple[LeafPlan, ...]
    kl_divergence: float
    remark: str | None = None

    def __str__(self) -> str:
        sizes = [(math.prod(leaf.shape), leaf.is_variational) for leaf in self.leaves]
        converted = sum(size for size, is_converted in sizes if is_converted)
        total = f"{converted:,} of {sum(size for size, _ in sizes):,} numbers become variational, KL {self.kl_divergence:,.0f} nats at the start"
        return "\n".join([*map(str, self.leaves), total, *([self.remark] if self.remark else [])])
