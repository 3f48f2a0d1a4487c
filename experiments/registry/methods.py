"""The methods that ``--method`` takes: one for each prior, and those that compress a trained plain network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.registry.priors import PRIORS
from experiments.registry.registry import Registry

# A function of ``experiments.pipeline.plain_methods``: (work, params, key) to params, masks and perhaps levels.
Compress = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class PlainMethod:
    """A method that prunes and quantises a trained plain network weight by weight.

    Attributes:
      name: The name for ``--method`` and results.
      title: The name in tables.
      load: A function that returns the method itself, see ``experiments.pipeline.plain_methods``. It imports the method late, since JAX takes seconds.
    """

    name: str
    title: str
    load: Callable[[], Compress]


def _deep_compression() -> Compress:
    from experiments.pipeline import plain_methods

    return plain_methods.deep_compression


def _network_surgery() -> Compress:
    from experiments.pipeline import plain_methods

    return plain_methods.network_surgery


def _soft_weight_sharing() -> Compress:
    from experiments.pipeline import plain_methods

    return plain_methods.soft_weight_sharing


PLAIN_METHODS = Registry(
    "plain method",
    PlainMethod("dc", "Deep Compression", _deep_compression),
    PlainMethod("dns", "Dynamic Network Surgery", _network_surgery),
    PlainMethod("sws", "soft weight-sharing", _soft_weight_sharing),
)


def method_names() -> list[str]:
    """The names of all methods: the priors, then the plain methods."""
    return [*PRIORS, *PLAIN_METHODS]


def method_title(name: str) -> str:
    """The name of a method in tables."""
    return PLAIN_METHODS[name].title if is_plain(name) else PRIORS[name].title


def is_plain(name: str) -> bool:
    """Whether a method compresses a trained plain network."""
    return name in PLAIN_METHODS
