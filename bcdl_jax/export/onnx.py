"""Networks as ONNX, for onnxruntime and other runtimes."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._atomic_file import check_writable
from bcdl_jax._tree import PyTree, array_names, check_arrays, is_key, named_arrays
from bcdl_jax.export.onnx_converter import Converter
from bcdl_jax.export.onnx_graph import IR_VERSION, OPSET, Graph, Tensor, describe
from bcdl_jax.export.symbolic_batch import batch_size_errors, first_line, symbolic_inputs
from bcdl_jax.graph.example_inputs import as_inputs, resized
from bcdl_jax.graph.program import Program, compile_quickly
from bcdl_jax.graph.tracing import trace

# Protocol buffers hold at most 2 GiB. Larger constants go to a file of their own.
_MOST_INLINE_BYTES = 2**31 - 2**20
# The largest allowed difference of the outputs, relative to the largest output, by the least precise type of floats in the network.
_TOLERANCES = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3, "float64": 1e-3}


def export_onnx(path: str | os.PathLike[str], apply: Callable[..., PyTree], params: PyTree, example_inputs: Any) -> int:
    """Writes a network with its params as ONNX. Needs ``onnx`` (``pip install -e '.[onnx]'``).

    The file is checked before it gets its name: by the checker of ``onnx`` and, if ``onnxruntime`` is installed, by a run at two batch
    sizes. The outputs must agree with those of ``apply`` up to 0.001 of the largest output, 0.02 if the network holds float16, 0.1 if it
    holds bfloat16. Values of bfloat16 and small integers are computed in float32 and int32 between casts, as are float16 and float64 where
    onnxruntime has no kernel for them.

    Args:
      path: The file. It is written under a temporary name and then renamed. Params of more than 2 GB go to a second file, ``path`` + ".data".
      apply: The network, ``apply(params, *inputs)``, such as the small function from ``shrink``.
      params: The params of the network.
      example_inputs: A tuple of inputs, or a single array. The first array begins with the batch axis. It and each other leading axis of the
        same length get a variable size.

    Returns:
      The number of bytes of the file or files.

    Raises:
      ValueError: The first input has no leading axis, an input is a typed PRNG key, a leaf of ``params`` is not an array, or the network
        does not run at every batch size.
      OSError: The file cannot be written.
      ModuleNotFoundError: The package onnx is not installed.
      NotImplementedError: A step of the network has no counterpart in ONNX, or onnxruntime refuses the file or computes something else. The
        error names the step.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ModuleNotFoundError("export_onnx needs onnx: pip install -e '.[onnx]'.")
    check_writable(path)
    check_arrays(params)
    inputs = symbolic_inputs(example_inputs)
    if any(map(is_key, jax.tree.leaves(inputs))):
        raise ValueError(
            "example_inputs holds a typed PRNG key, which ONNX does not have; export the network with deterministic=True."
        )
    with batch_size_errors():
        program = trace(apply, params, *inputs)
    examples = as_inputs(example_inputs)
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".onnx") as directory:
        draft = Path(directory) / target.name
        try:
            _write_checked(draft, program, apply, params, examples, floats_in_float32=False)
        except _RefusedError:
            _write_checked(draft, program, apply, params, examples, floats_in_float32=True)
        files = sorted(Path(directory).iterdir(), key=lambda file: file.name == target.name)
        for file in files:
            file.replace(target.parent / file.name)
    return sum((target.parent / file.name).stat().st_size for file in files)


class _RefusedError(NotImplementedError):
    """A file that onnxruntime refuses, or that computes something else."""


def _write_checked(
    path: Path,
    program: Program,
    apply: Callable[..., PyTree],
    params: PyTree,
    examples: tuple[PyTree, ...],
    floats_in_float32: bool,
) -> None:
    """Writes a file, and checks it. Raises NotImplementedError if a check fails."""
    import onnx

    model, size = _model(program, params, examples, floats_in_float32)
    if size > _MOST_INLINE_BYTES:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString())
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise _RefusedError(f"The checker of onnx refuses the file: {first_line(error)}") from error
    if importlib.util.find_spec("onnxruntime") is not None:
        _check_in_onnxruntime(path, program, apply, params, examples)


def _model(program: Program, params: PyTree, examples: tuple[PyTree, ...], floats_in_float32: bool) -> tuple[Any, int]:
    """The model, and the number of bytes of its constants."""
    from onnx import helper

    graph = Graph(floats_in_float32)
    leaves = jax.tree.leaves(params)
    numbers = program.inputs[: len(leaves)]
    values: dict[int, Any] = dict(zip(numbers, leaves, strict=True))
    names = dict(zip(numbers, (name for name, _ in named_arrays(params)), strict=True))
    entries = []
    for number, name in zip(program.inputs[len(leaves) :], input_names(examples), strict=True):
        struct = program.shapes[number]
        tensor = Tensor(name, struct.shape, np.dtype(struct.dtype))
        entries.append(describe(tensor))
        if graph.batch is None and struct.shape and not isinstance(struct.shape[0], int):
            graph.batch = graph.add("Shape", [tensor], (1,), np.int64, start=0, end=1)
        values[number] = graph.cast(tensor, graph.carrier(struct.dtype))
    converter = Converter(program, graph, values, names)
    converter.run()
    outputs = []
    for place, number in enumerate(program.outputs):
        struct = program.shapes[number]
        whole = graph.cast(converter.whole(number), struct.dtype)
        named = Tensor(f"output_{place}", struct.shape, whole.dtype)
        graph.nodes.append(helper.make_node("Identity", [whole.name], [named.name], named.name))
        outputs.append(describe(named))
    used = _names_read(graph.nodes)
    constants = [constant for name, constant in graph.initializers.items() if name in used]
    body = helper.make_graph(graph.nodes, "network", entries, outputs, constants)
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="bcdl_jax"
    )
    return model, sum(len(each.raw_data) for each in constants)


def _names_read(nodes: Any) -> set[str]:
    """The names of all tensors that nodes read, also in the bodies of loops and branches."""
    names = {name for node in nodes for name in node.input}
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _names_read(attribute.g.node) | {output.name for output in attribute.g.output}
    return names


def input_names(examples: tuple[PyTree, ...]) -> list[str]:
    """The names of the inputs of the file: "input_0", "input_1" and so on, with the path within an input that is a tree."""
    names = []
    for place, example in enumerate(examples):
        paths = array_names([path for path, _ in jax.tree_util.tree_leaves_with_path(example)])
        names += [f"input_{place}" + (f"/{path}" if path else "") for path in paths]
    return names


def _check_in_onnxruntime(
    path: Path, program: Program, apply: Callable[..., PyTree], params: PyTree, examples: tuple[PyTree, ...]
) -> None:
    """Runs a file, and compares the results with those of the network. Raises _RefusedError if they differ."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # The exception already holds the message.
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises errors of types of its own.
        raise _RefusedError(f"onnxruntime refuses the file: {first_line(error)}") from error
    types = {
        np.dtype(shape.dtype).name
        for shape in program.shapes
        if not jax.dtypes.issubdtype(shape.dtype, jax.dtypes.extended)
    }
    tolerance = max((_TOLERANCES[name] for name in types if name in _TOLERANCES), default=0.0)
    for inputs in _two_batches(apply, params, examples):
        expected = jax.tree.leaves(compile_quickly(apply, params, *inputs)(params, *inputs))
        feed = dict(zip(input_names(inputs), map(np.asarray, jax.tree.leaves(inputs)), strict=True))
        try:
            results = _run(session, feed)
        except Exception as error:
            raise _RefusedError(f"onnxruntime cannot run the file: {first_line(error)}") from error
        for mine, theirs in zip(results, expected, strict=True):
            _compare(mine, np.asarray(theirs), tolerance)


def _run(session: Any, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a session. Arrays of bfloat16 go in and out as their bits, since NumPy has no such type."""
    import onnxruntime

    known = {entry.name for entry in session.get_inputs()}
    if all(array.dtype.name != "bfloat16" for array in feed.values()) and all(
        "bfloat16" not in entry.type for entry in session.get_outputs()
    ):
        return session.run(None, {name: array for name, array in feed.items() if name in known})
    from onnx import TensorProto

    binding = session.io_binding()
    for name, array in feed.items():
        if name in known:
            is_wide = array.dtype.name != "bfloat16"
            value = (
                onnxruntime.OrtValue.ortvalue_from_numpy(array)
                if is_wide
                else onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    array.view(np.uint16), TensorProto.BFLOAT16
                )
            )
            binding.bind_ortvalue_input(name, value)
    for entry in session.get_outputs():
        binding.bind_output(entry.name)
    session.run_with_iobinding(binding)
    outputs = []
    for entry, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        outputs.append(np.from_dlpack(value) if "bfloat16" not in entry.type else _bfloat16(value))
    return outputs


def _bfloat16(value: Any) -> np.ndarray:
    return np.asarray(jnp.from_dlpack(value))


def _two_batches(
    apply: Callable[..., PyTree], params: PyTree, examples: tuple[PyTree, ...]
) -> list[tuple[PyTree, ...]]:
    """The examples, and the same with another number of them."""
    size = next(np.shape(leaf)[0] for leaf in jax.tree.leaves(examples) if np.ndim(leaf))
    given = resized(examples, size, size)
    if not size:
        return [given]
    other = 1 if size > 1 else 2
    try:
        jax.eval_shape(apply, params, *resized(examples, size, other))
    except Exception:  # The network failed with this batch size; the type of its error is unknown.
        other = size + 1
    return [given, resized(examples, size, other)]


def _compare(mine: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    if mine.shape != theirs.shape:
        raise _RefusedError(
            f"onnxruntime computes an output of shape {mine.shape}, where the network has {theirs.shape}"
        )
    if not theirs.size:
        return
    first, second = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    if jnp.issubdtype(theirs.dtype, jnp.inexact):
        finite = np.isfinite(second)
        with np.errstate(invalid="ignore"):
            same |= abs(first - second) <= tolerance * max(1e-30, np.max(abs(second), where=finite, initial=0))
    if not same.all():
        raise _RefusedError("onnxruntime computes other outputs from the file than the network")
