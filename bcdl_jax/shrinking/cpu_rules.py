"""Rules that replace convolutions and max pooling by operations that a CPU runs faster.

A convolution is a product of patches and kernel. With few channels, as in a pruned network, the patches would be copied number by number.
But each row of the output is also the product of some input rows and a banded matrix. The matrix holds the kernel once for each of a block
of neighbouring output columns. This product multiplies by zeros, too, but at the full speed of matrix products.
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

from bcdl_jax.graph.program import Step
from bcdl_jax.graph.windows import window_count
from bcdl_jax.shrinking.chunks import in_chunks

# The size of the patches that are multiplied at a time, measured like the size of a chunk in ``cpu``.
_PATCH_BYTES = 2**23
# At each place, a window reads width times channels numbers from an image row. Up to _FEW_NUMBERS of them, the convolution becomes a product
# with a banded matrix. Above _MANY_NUMBERS, it becomes a product with patches if it runs in a loop. In between, XLA is fastest.
_FEW_NUMBERS = 16
_MANY_NUMBERS = 32
# The approximate number of outputs of a block of columns.
_BLOCK_OUTPUTS = 72
# The largest window of a max pooling that becomes a maximum of slices, in numbers.
_LARGEST_WINDOW = 16


def convolution(step: Step, images: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """A two-dimensional convolution of few channels as a product with a banded matrix; None for any other convolution."""
    few = kernel.ndim == 4 and _row_numbers(step, kernel) <= _FEW_NUMBERS
    return _product(step, images, kernel, _banded_product) if few else None


def convolution_in_a_loop(step: Step, images: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """A two-dimensional convolution as a matrix product; None for a convolution that XLA runs faster, or that cannot be one."""
    numbers = _row_numbers(step, kernel) if kernel.ndim == 4 else 0
    if _FEW_NUMBERS < numbers <= _MANY_NUMBERS:
        return None
    return _product(step, images, kernel, _banded_product if numbers <= _FEW_NUMBERS else _patches_product)


def max_pool(step: Step, values: jax.Array) -> jax.Array | None:
    """Max pooling as a maximum of slices; None if windows overlap, are large, padded or dilated."""
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


def _row_numbers(step: Step, kernel: jax.Array) -> int:
    spec = step.params["dimension_numbers"].rhs_spec
    return kernel.shape[spec[3]] * kernel.shape[spec[1]]


# A product takes images [batch, rows, columns, channels] and a kernel [rows, columns, channels, features], with strides and padding of rows
# and columns and a precision. It returns outputs [batch, rows, columns, features].


def _product(step: Step, images: jax.Array, kernel: jax.Array, product: Callable[..., jax.Array]) -> jax.Array | None:
    """A convolution, computed by the given product; None if it has groups, dilation or negative padding, or mixes dtypes."""
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


def _output_sizes(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> tuple[int, int]:
    rows, columns = (
        window_count(images.shape[axis + 1] + sum(padding[axis]), kernel.shape[axis], strides[axis]) for axis in (0, 1)
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
    return in_chunks(multiply, images, max(1, fitting))


def _banded_product(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, precision: Any) -> jax.Array:
    window_rows, window_columns, channels, features = kernel.shape
    batch = images.shape[0]
    rows, columns = _output_sizes(images, kernel, strides, padding)
    # All blocks have the same number of output columns. The last block may extend beyond the edge.
    blocks = max(1, columns // max(1, -(-_BLOCK_OUTPUTS // features)))
    width = -(-columns // blocks)
    blocks = -(-columns // width)
    read = (width - 1) * strides[1] + window_columns
    beyond = max(0, (blocks - 1) * width * strides[1] + read - images.shape[2] - sum(padding[1]))
    images = jnp.pad(images, ((0, 0), padding[0], (padding[1][0], padding[1][1] + beyond), (0, 0)))

    # window_column[i, o] is the column of the window at which output column o of a block reads its input column i.
    window_column = np.arange(read)[:, None] - strides[1] * np.arange(width)
    selects = np.arange(window_columns)[:, None, None] == window_column
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
