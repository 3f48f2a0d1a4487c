"""Any JAX function as a list of steps, and what is constant, read and coupled in it."""

from bcdl_jax.graph.data_flow import analyze
from bcdl_jax.graph.program import Program, Step, multiply_adds, rewrite, trace

__all__ = [
    "Program",
    "Step",
    "analyze",
    "multiply_adds",
    "rewrite",
    "trace",
]
