"""Any JAX function as a list of steps, with an analysis of its constants and of the elements that it reads."""

from bcdl_jax.graph.counting import multiply_adds
from bcdl_jax.graph.data_flow import analyze
from bcdl_jax.graph.moving import differences
from bcdl_jax.graph.program import Program, Step
from bcdl_jax.graph.tracing import rewrite, trace

__all__ = [
    "Program",
    "Step",
    "analyze",
    "differences",
    "multiply_adds",
    "rewrite",
    "trace",
]
