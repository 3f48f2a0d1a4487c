"""The registries: priors, plain methods, networks and experiments. A new one of each kind is one entry here."""

from experiments.registry.experiments import EXPERIMENTS, Experiment, paper_datasets
from experiments.registry.methods import PLAIN_METHODS, PlainMethod, is_plain, method_names, method_title
from experiments.registry.networks import NETWORKS, Network, title_at_width
from experiments.registry.priors import PRIORS, Prior
from experiments.registry.registry import Registry

__all__ = [
    "EXPERIMENTS",
    "NETWORKS",
    "PLAIN_METHODS",
    "PRIORS",
    "Experiment",
    "Network",
    "PlainMethod",
    "Prior",
    "Registry",
    "is_plain",
    "method_names",
    "method_title",
    "paper_datasets",
    "title_at_width",
]
