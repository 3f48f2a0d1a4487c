"""Computes a network in the form that a CPU runs fastest.

XLA's convolution on a CPU gathers the patches of all examples before it multiplies. It is slow if they do not fit the cache, so a large
batch is processed in chunks. Within the loop over the chunks, XLA runs a convolution on one core, but a matrix product on all cores. So
``cpu_rules`` turns convolutions into matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.program import Program, data_dependent
from bcdl_jax.graph.tracing import rewrite, trace
from bcdl_jax.shrinking.chunks import in_chunks
from bcdl_jax.shrinking.cpu_rules import convolution, convolution_in_a_loop, max_pool

# The size of the largest intermediate value of a chunk. It was measured on a CPU with 2 MiB of second-level cache per core, where half and
# double this size cost at most a quarter more time.
_CHUNK_BYTES = 2**22


def for_cpu(apply: Callable[..., PyTree], *, examples_at_a_time: int | None = None) -> Callable[..., PyTree]:
    """The same function, in the form that a CPU runs fastest.

    Two-dimensional convolutions of few channels become matrix products, and max pooling over windows that do not overlap becomes a maximum of
    slices. A large batch is processed in chunks that fit the cache. For finite inputs the results agree up to rounding. Gradients agree,
    too, except where two inputs of a max pooling are equal. Custom derivatives are kept for elementwise functions (activations) alone.

    Args:
      apply: A function ``apply(params, *inputs)``, such as the small function of ``shrink``. It can be any JAX function that treats the
        examples one by one, such as a network at inference, but not batch norm in training. The leading axis of every input and output
        must be the batch.
      examples_at_a_time: The number of examples in a chunk, or None for as many as fit the cache.

    Returns:
      A function of the same arguments, for use under ``jax.jit``. It works under ``vmap`` and ``grad``. It also works on other devices, but is
      not faster there.

    Raises:
      ValueError: ``examples_at_a_time`` is less than 1. The returned function raises it if an input or output does not have the batch as
        its leading axis.
    """
    if examples_at_a_time is not None and examples_at_a_time < 1:
        raise ValueError(f"examples_at_a_time is {examples_at_a_time}; it must be at least 1, or None.")
    whole, looped = (
        rewrite(apply, {"conv_general_dilated": rule, "reduce_window_max": max_pool})
        for rule in (convolution, convolution_in_a_loop)
    )

    def chunked(params: PyTree, *inputs: PyTree) -> PyTree:
        batch = _batch_size("input", inputs)
        if not isinstance(batch, int):  # The batch size is symbolic in an export.
            return whole(params, *inputs)
        num_params = len(jax.tree.leaves(params))
        size = examples_at_a_time or _examples_that_fit(trace(apply, params, *inputs), num_params, batch)
        run = whole if batch <= size else looped

        def run_chunk(chunk: PyTree) -> PyTree:
            outputs, given = run(params, *chunk), _batch_size("input", chunk)
            if (found := _batch_size("output", outputs)) != given:
                raise ValueError(
                    f"The outputs have a leading axis of {found} for {given} examples; it must be the batch."
                )
            return outputs

        return in_chunks(run_chunk, inputs, size)

    return chunked


def _batch_size(kind: str, tree: PyTree) -> int:
    """The batch size of a tree of inputs or outputs.

    Raises:
      ValueError: The leading axes of the arrays differ, or an array is a scalar.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or () in sizes:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(tree))
        raise ValueError(f"The {kind}s have shapes {shapes}; all must have the batch as their leading axis.")
    return sizes.pop()[0]


def _examples_that_fit(program: Program, num_params: int, batch: int) -> int:
    """The number of examples whose largest value that depends on the inputs has ``_CHUNK_BYTES``, rounded down to a power of two."""
    depends = data_dependent(program, num_params)
    sizes = [
        program.shapes[number].size * program.shapes[number].dtype.itemsize
        for step in program.steps
        for number in step.outputs
        if number in depends and hasattr(program.shapes[number].dtype, "itemsize")
    ]
    return 2 ** max(0, (_CHUNK_BYTES * batch // max([1, *sizes])).bit_length() - 1)
