"""The same network in the form that a CPU runs fastest.

XLA's convolution on a CPU gathers the patches of all examples before it multiplies, and is slow when they do not fit the cache: so a
large batch is worked off in pieces that do. In such a loop XLA runs convolutions on one core, but matrix products on all: so there
a convolution becomes the product of patches and kernel. With few channels, as in a pruned network, patches are moved number by number.
But a convolution is also one matrix product for each row of the output, with a banded matrix that holds the kernel once for each
of a block of neighbouring columns. That multiplies with zeros too, but at the full speed of matrix products.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bcdl_jax.graph.program import Program, Step, data_dependent, rewrite, trace

PyTree = Any

# A piece of the batch is so large that its largest intermediate value has about this size; so much for the patches of a convolution.
# Measured on a CPU with 2 MiB of second-level cache per core; half and double of them are at most a quarter slower.
_PIECE_BYTES = 2**22
_PATCH_BYTES = 2**23
# A convolution whose window reads up to so many numbers of a row becomes a product with a banded matrix, whose blocks make about so
# many outputs. One that reads many becomes a product with patches in a loop; XLA is best at those between.
_FEW_NUMBERS = 16
_MANY_NUMBERS = 32
_BLOCK_OUTPUTS = 72
# Pooling over at most so many numbers becomes maxima of slices.
_LARGEST_WINDOW = 16


def for_cpu(apply: Callable[..., PyTree], *, examples_at_a_time: int | None = None) -> Callable[..., PyTree]:
    """The same function, computed in the way that suits a CPU.

    Two-dimensional convolutions of few channels become matrix products, max pooling over windows that do not overlap becomes maxima of slices,
    and a large batch is worked off in pieces that fit the cache. For finite inputs the results agree up to rounding; so do gradients, except
    where a maximum is reached twice. Custom derivatives are kept of elementwise functions (activations) only.

    Args:
      apply: ``apply(params, *inputs)``, such as the small function of ``shrink``; any JAX function that treats the examples one by one (a
        network at inference does, batch norm in training does not). The leading axis of every array in inputs and outputs is the
        batch.
      examples_at_a_time: how many examples to run at once; as many as fit the cache if it is None.

    Returns:
      A function of the same arguments, for use under ``jax.jit``. It works under ``vmap`` and ``grad``, and on other devices, where it is
      no faster than ``apply``.

    Raises:
      ValueError: ``examples_at_a_time`` is less than 1; later, if an array in inputs or outputs does not have the batch as its leading axis.
    """
    if examples_at_a_time is not None and examples_at_a_time < 1:
        raise ValueError(f"examples_at_a_time is {examples_at_a_time}; it must be at least 1, or None.")
    whole, looped = (
        rewrite(apply, {"conv_general_dilated": rule, "reduce_window_max": _max_pool})
        for rule in (_convolution, _convolution_in_a_loop)
    )

    def in_pieces(params: PyTree, *inputs: PyTree) -> PyTree:
        batch = _batch_size("input", inputs)
        if not isinstance(batch, int):  # symbolic: an export for any batch size
            return whole(params, *inputs)
        num_params = len(jax.tree.leaves(params))
        size = examples_at_a_time or _examples_that_fit(trace(apply, params, *inputs), num_params, batch)
        run = whole if batch <= size else looped

        def piece(inputs: PyTree) -> PyTree:
            outputs, given = run(params, *inputs), _batch_size("input", inputs)
            if (found := _batch_size("output", outputs)) != given:
                raise ValueError(
                    f"The outputs have a leading axis of {found} for {given} examples; it must be the batch."
                )
            return outputs

        return _in_pieces(piece, inputs, size)

    return in_pieces


def _in_pieces(function: Callable[[PyTree], PyTree], inputs: PyTree, size: int) -> PyTree:
    """``function`` applied to ``size`` examples at a time, and to what remains."""
    batch = np.shape(jax.tree.leaves(inputs)[0])[0]
    if batch <= size:
        return function(inputs)
    full = batch // size * size
    stacked = jax.tree.map(lambda leaf: leaf[:full].reshape(-1, size, *leaf.shape[1:]), inputs)
    outputs = jax.tree.map(lambda leaf: leaf.reshape(full, *leaf.shape[2:]), lax.map(function, stacked))
    if full == batch:
        return outputs
    rest = function(jax.tree.map(lambda leaf: leaf[full:], inputs))
    return jax.tree.map(lambda first, last: jnp.concatenate([first, last]), outputs, rest)


def _batch_size(what: str, tree: PyTree) -> int:
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or () in sizes:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(tree))
        raise ValueError(f"The {what}s have shapes {shapes}; all must have the batch as their leading axis.")
    return sizes.pop()[0]


def _examples_that_fit(program: Program, num_params: int, batch: int) -> int:
    """As many as make the largest value that depends on the inputs fit the cache, rounded down to a power of two."""
    depends = data_dependent(program, num_params)
    sizes = [
        program.shapes[number].size * program.shapes[number].dtype.itemsize
        for step in program.steps
        for number in step.outputs
        if number in depends and hasattr(program.shapes[number].dtype, "itemsize")
    ]
    return 2 ** max(0, (_PIECE_BYTES * batch // max([1, *sizes])).bit_length() - 1)


def _convolution(step: Step, images: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """A two-dimensional convolution of few channels as a product with a banded matrix; None for any other."""
    few = kernel.ndim == 4 and _row_numbers(step, kernel) <= _FEW_NUMBERS
    return _product(step, images, kernel, _banded_product) if few else None


def _convolution_in_a_loop(step: Step, images: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """A two-dimensional convolution as a matrix product; None for what cannot be one, or is better off without."""
    numbers = _row_numbers(step, kernel) if kernel.ndim == 4 else 0
    if _FEW_NUMBERS < numbers <= _MANY_NUMBERS:
        return None
    return _product(step, images, kernel, _banded_product if numbers <= _FEW_NUMBERS else _patches_product)


def _row_numbers(step: Step, kernel: jax.Array) -> int:
    spec = step.params["dimension_numbers"].rhs_spec
    return kernel.shape[spec[3]] * kernel.shape[spec[1]]


def _product(step: Step, images: jax.Array, kernel: jax.Array, product: Callable[..., jax.Array]) -> jax.Array | None:
    params = step.params
    numbers = params["dimension_numbers"]
    plain = (
        images.ndim == 4
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and set(params["lhs_dilation"]) == set(params["rhs_dilation"]) == {1}
        and min(itertools.chain(*params["padding"])) >= 0
        and jnp.issubdtype(images.dtype, jnp.floating)
        and images.dtype == kernel.dtype
        and (params["preferred_element_type"] is None or params["preferred_element_type"] == images.dtype)
    )
    if not plain or 0 in kernel.shape or 0 in images.shape:
        return None
    images = images.transpose([numbers.lhs_spec[axis] for axis in (0, 2, 3, 1)])
    kernel = kernel.transpose([numbers.rhs_spec[axis] for axis in (2, 3, 1, 0)])
    if min(_output_sizes(images, kernel, params["window_strides"], params["padding"])) < 1:
        return None
    outputs = product(images, kernel, params["window_strides"], params["padding"], params["precision"])
    return outputs.transpose(np.argsort([numbers.out_spec[axis] for axis in (0, 2, 3, 1)]).tolist())


# Both: images [batch, rows, columns, channels], kernel [rows, columns, channels, features] -> [batch, rows, columns, features].


def _output_sizes(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> tuple[int, int]:
    rows, columns = (
        (images.shape[axis + 1] + sum(padding[axis]) - kernel.shape[axis]) // strides[axis] + 1 for axis in (0, 1)
    )
    return rows, columns


def _patches_product(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, precision: Any) -> jax.Array:
    window_rows, window_columns, _, features = kernel.shape
    rows, columns = _output_sizes(images, kernel, strides, padding)
    matrix = kernel.reshape(-1, features)

    def multiply(images: jax.Array) -> jax.Array:
        images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
        ends = ((rows - 1) * strides[0] + 1, (columns - 1) * strides[1] + 1)
        patches = jnp.concatenate(
            [
                images[:, row : row + ends[0] : strides[0], column : column + ends[1] : strides[1]]
                for row in range(window_rows)
                for column in range(window_columns)
            ],
            -1,
        )
        product = jnp.dot(patches.reshape(-1, len(matrix)), matrix, precision=precision)
        return product.reshape(len(images), rows, columns, features)

    fitting = _PATCH_BYTES // (rows * columns * len(matrix) * images.dtype.itemsize)
    return _in_pieces(multiply, images, max(1, fitting))


def _banded_product(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, precision: Any) -> jax.Array:
    window_rows, window_columns, channels, features = kernel.shape
    batch = images.shape[0]
    rows, columns = _output_sizes(images, kernel, strides, padding)
    # Blocks of equal numbers of output columns, the last of them beyond the edge if need be.
    blocks = max(1, columns // max(1, -(-_BLOCK_OUTPUTS // features)))
    width = -(-columns // blocks)
    blocks = -(-columns // width)
    read = (width - 1) * strides[1] + window_columns
    beyond = max(0, (blocks - 1) * width * strides[1] + read - images.shape[2] - sum(padding[1]))
    images = jnp.pad(images, ((0, 0), padding[0], (padding[1][0], padding[1][1] + beyond), (0, 0)))

    place = np.arange(read)[:, None] - strides[1] * np.arange(
        width
    )  # in the window, of a column read, for an output column
    selects = np.arange(window_columns)[:, None, None] == place
    banded = jnp.einsum("rkcf,kio->ricof", kernel, selects.astype(kernel.dtype), precision=precision)

    flat = images.reshape(batch, images.shape[1], -1)
    row_slices = [flat[:, row : row + (rows - 1) * strides[0] + 1 : strides[0]] for row in range(window_rows)]
    starts = [block * width * strides[1] * channels for block in range(blocks)]
    patches = jnp.stack(
        [jnp.concatenate([each[..., start : start + read * channels] for each in row_slices], -1) for start in starts],
        2,
    )
    outputs = lax.dot_general(
        patches.reshape(-1, window_rows * read * channels),
        banded.reshape(-1, width * features),
        (((1,), (0,)), ((), ())),
        precision=precision,
    )
    return outputs.reshape(batch, rows, blocks * width, features)[:, :, :columns]


def _max_pool(step: Step, values: jax.Array) -> jax.Array | None:
    """Max pooling over windows that lie side by side, as maxima of slices; None for any other."""
    window, strides = step.params["window_dimensions"], step.params["window_strides"]
    if (
        window != strides
        or np.prod(window) > _LARGEST_WINDOW
        or any(itertools.chain(*step.params["padding"]))
        or {*step.params["base_dilation"], *step.params["window_dilation"]} != {1}
        or any(size < each for size, each in zip(values.shape, window, strict=True))
    ):
        return None
    shape: list[int] = []
    for axis, (size, each) in enumerate(zip(values.shape, window, strict=True)):
        values = lax.slice_in_dim(values, 0, size // each * each, axis=axis)
        shape += [size // each, each]
    values = values.reshape(shape)
    parts = itertools.product(*(range(each) for each in window))
    return functools.reduce(
        jnp.maximum, (values[tuple(itertools.chain(*((slice(None), i) for i in part)))] for part in parts)
    )
