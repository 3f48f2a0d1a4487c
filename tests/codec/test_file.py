import os
import random
import re
import resource
import subprocess
import sys
import zlib

import flax.struct
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.__main__ import main
from tests.codec import reference_decoder
from tests.conftest import CHAIN, CONV_CHAIN, make_posterior, prune_half

DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES += ("float16", "bfloat16", "float32", "float64")


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()


def reduced_nets(net, conv_net):
    """Quantised nets by both rules: unpruned, half pruned, and fully pruned."""
    nets = []
    for (_, params, _), chain in ((net, CHAIN), (conv_net, CONV_CHAIN)):
        whole, empty = (bcdl_jax.prune(params, threshold, chain) for threshold in (np.inf, -np.inf))
        for pruned in (whole, prune_half(params, chain), empty):
            nets += [
                bcdl_jax.reduce_precision(pruned, 0.25),
                bcdl_jax.compression.reduce_precision_by_round_off(pruned),
            ]
    return nets


def some_tree(rng):
    layer = make_posterior(jax.random.key(int(rng.integers(100))), (9, 6), "input")
    layer = layer.replace(input_mask=jnp.asarray(rng.random(9) < 0.6), output_mask=jnp.asarray(rng.random(6) < 0.7))
    tree = {"a": layer, "b": np.round(rng.normal(size=(12, 17)) * 4).astype(np.int16)}
    tree |= {"c": rng.normal(size=5).astype(np.float32), "d": rng.random((3, 4)) < 0.5}
    return bcdl_jax.reduce_precision(tree, 0.25)


def test_round_trip_of_quantized_nets(net, conv_net, tmp_path):
    for number, reduced in enumerate(reduced_nets(net, conv_net)):
        path = tmp_path / f"{number}.bcdl"
        size = bcdl_jax.save(path, reduced)
        assert size == path.stat().st_size == len(bcdl_jax.codec.encode(reduced))
        assert_same(bcdl_jax.load(path, like=reduced), reduced)
        bcdl_jax.save(path, reduced, names=True)
        loaded = bcdl_jax.load(path)
        names = [name.removesuffix("/posterior") for name, _ in zip(reduced, loaded, strict=True)]
        assert names == list(loaded)
        assert_same(loaded, reduced)


def test_fresh_params_are_a_valid_template(net):
    model, params, inputs = net
    reduced = bcdl_jax.reduce_precision(params, 0.25)
    fresh = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    assert_same(bcdl_jax.codec.decode(bcdl_jax.codec.encode(reduced), fresh), reduced)


def test_grouped_convolution_and_other_types():
    layer = make_posterior(jax.random.key(1), (3, 3, 2, 6), "output", feature_group_count=3)
    layer = layer.replace(output_mask=jnp.array([1.0, 0, 1, 1, 0, 0]))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        typed = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), layer)
        reduced = bcdl_jax.reduce_precision({"conv": typed}, 0.25)
        assert_same(bcdl_jax.codec.decode(bcdl_jax.codec.encode(reduced), reduced), reduced)


def arrays():
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)

    def of(name):
        dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)
        if name == "bfloat16":
            return hnp.arrays(np.uint16, shapes).map(lambda array: array.view(dtype))
        return hnp.arrays(dtype, shapes)

    def with_zero_slices(pair):
        array, seed = pair
        rng = np.random.default_rng(seed)
        array = array.copy()
        for axis in range(array.ndim):
            np.moveaxis(array, axis, 0)[rng.random(array.shape[axis]) < rng.choice([0, 0.5])] = 0
        return array

    return st.tuples(st.sampled_from(DTYPES).flatmap(of), st.integers(0, 1000)).map(with_zero_slices)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.dictionaries(st.text("abc_0", min_size=1, max_size=4), arrays(), max_size=4), st.booleans())
def test_any_tree_of_arrays_is_read_exactly(tree, names):
    data = bcdl_jax.codec.encode(tree, names=names)
    assert_same(bcdl_jax.codec.decode(data, None if names else tree), tree)
    stored, entries = reference_decoder.decode(data)
    assert stored == (sorted(tree) if names else None)
    for entry, name in zip(entries, sorted(tree), strict=True):
        assert entry["value"].dtype == tree[name].dtype
        assert entry["value"].tobytes() == tree[name].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("exponent", [-20, -7, 0, 3])
def test_floats_that_are_multiples_of_a_power_of_two_are_coded(dtype, exponent):
    integers = np.random.default_rng(0).integers(-60, 60, (40, 30))
    array = np.ldexp(integers.astype(np.float64), exponent).astype(dtype)
    data = bcdl_jax.codec.encode({"a": array})
    back = bcdl_jax.codec.decode(data, {"a": array})["a"]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    assert len(data) < 0.95 * integers.size
    (entry,) = reference_decoder.decode(data)[1]
    np.testing.assert_array_equal(entry["value"], array)
    # A zero with a sign, and a number between the multiples, are read exactly, too.
    for value in (-0.0, 1 / 3, np.inf, np.nan):
        array[3, 4] = value
        back = bcdl_jax.codec.decode(bcdl_jax.codec.encode({"a": array}), {"a": array})["a"]
        np.testing.assert_array_equal(back.view(np.uint8), array.view(np.uint8))


def test_coded_floats_that_their_type_cannot_hold_are_refused():
    data = bytearray(bcdl_jax.codec.encode({"a": np.full((3, 3), 48, np.float16)}))
    place = data.index(bytes([3, 3, 4])) + 2
    data[place] = 100
    data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    with pytest.raises(bcdl_jax.codec.CompressedFileError, match="a float is not a number of its type"):
        bcdl_jax.codec.decode(bytes(data), {"a": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="a float that its type cannot hold"):
        reference_decoder.decode(bytes(data))


def test_the_reference_decoder_reads_an_array_of_more_than_one_block():
    values = np.round(np.random.default_rng(0).laplace(size=(900, 40)) * 4).astype(np.int8)
    _, entries = reference_decoder.decode(bcdl_jax.codec.encode({"a": values}))
    np.testing.assert_array_equal(entries[0]["value"], values)


def test_the_reference_decoder_reads_the_same_layers(net, conv_net):
    for reduced in reduced_nets(net, conv_net):
        _, entries = reference_decoder.decode(bcdl_jax.codec.encode(reduced))
        layers = jax.tree.leaves(reduced, is_leaf=bcdl_jax.compression.is_layer)
        for entry, layer in zip(entries, layers, strict=True):
            assert entry["group_axis"] == layer.group_axis
            assert entry["prunes_weights"] == layer.prunes_weights
            for field in ("kernel", "kernel_step", "bias", "bias_step", "input_mask", "output_mask"):
                np.testing.assert_array_equal(entry[field], getattr(layer, field))
            assert entry["kernel_bits"] == layer.kernel_bits
            assert entry["bias_bits"] == layer.bias_bits


def test_header_of_four_layers_takes_at_most_48_bytes():
    params = {str(number): make_posterior(jax.random.key(number), (300, 200), "input") for number in range(4)}
    none = jax.tree.map(jnp.zeros_like, params)  # Headers, steps and sets remain.
    reduced = bcdl_jax.reduce_precision(none, 0.25)
    data = bcdl_jax.codec.encode(reduced)
    # Without steps, kept indices and integers.
    assert len(data) - sum(entry.bytes for entry in bcdl_jax.codec.summarize(data)) <= 48


def test_steps_of_float64_are_read_exactly_without_x64():
    layer = bcdl_jax.reduce_precision({"a": make_posterior(jax.random.key(1), (3, 2), "input")}, 0.25)["a"]
    wide = {"a": layer.replace(kernel_step=np.float64(1e300), bias_step=np.float64(1 / 3))}
    loaded = bcdl_jax.codec.decode(bcdl_jax.codec.encode(wide), wide)["a"]
    assert (float(loaded.kernel_step), float(loaded.bias_step)) == (1e300, 1 / 3)


@pytest.mark.parametrize("width", [1, 2, 5, 8, 16, 32])
def test_no_array_takes_more_than_its_raw_bits_and_two_bytes(width):
    rng = np.random.default_rng(width)
    empty = len(bcdl_jax.codec.encode({"a": np.zeros((), np.int64)}))
    for count in (1, 2, 17, 300, 5000):
        values = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), count)
        raw = count * width / 8
        # The header of an array with one axis is two bytes longer than the header of a scalar.
        assert len(bcdl_jax.codec.encode({"a": values})) - empty - 2 <= raw + 2


def test_sparse_and_constant_arrays_take_few_bytes():
    values = np.zeros((300, 1000), np.int32)
    values[::100, 3] = 7
    tree = {"a": values, "b": np.zeros(10**5, np.float32), "c": np.ones(10**5, np.int8)}
    values = np.zeros(3 * 10**4, np.int8)
    values[np.random.default_rng(0).integers(0, 3 * 10**4, 50)] = 1
    tree["d"] = values
    data = bcdl_jax.codec.encode(tree)
    assert len(data) < 2500
    assert_same(bcdl_jax.codec.decode(data, tree), tree)
    constants = {name: np.full((60, 70), value) for name, value in (("a", -5), ("b", 2**32 - 1), ("c", True))}
    data = bcdl_jax.codec.encode(constants)
    assert len(data) < 60
    assert_same(bcdl_jax.codec.decode(data, constants), constants)
    for entry, value in zip(reference_decoder.decode(data)[1], constants.values(), strict=True):
        np.testing.assert_array_equal(entry["value"], value)


# Extreme ratios: what ``save`` writes, ``load`` reads.


@st.composite
def extreme_arrays(draw):
    """Large arrays of few bytes: zeros, one value, single values among zeros, blocks, and patterns of a short period."""
    size = draw(st.sampled_from([1, 5000, 10**5, 3 * 10**6]))
    dtype = draw(st.sampled_from(["bool", "int8", "int32", "float32"]))
    kind = draw(st.sampled_from(["constant", "single", "block", "period"]))
    value = draw(st.sampled_from([0, 1, 1]))
    if kind == "constant":
        array = np.full(size, value, dtype)
    elif kind == "single":
        array = np.zeros(size, dtype)
        array[draw(st.integers(0, size - 1))] = 1
    else:
        size = min(size, 2 * 10**4)  # The writer tries several codings of these.
        period = size if kind == "block" else draw(st.integers(2, 9))
        array = (np.arange(size) % period < draw(st.integers(1, max(1, period // 2)))).astype(dtype)
    rows = draw(st.sampled_from([1, 10, size]))
    return array.reshape(-1, rows) if size % rows == 0 else array


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.lists(extreme_arrays(), min_size=1, max_size=4))
def test_whatever_is_written_can_be_read(tree):
    assert_same(bcdl_jax.codec.decode(bcdl_jax.codec.encode(tree), tree), tree)


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_wide_layer_of_which_few_units_are_left(kept):
    layer = bcdl_jax.compression.QuantizedLayer(
        kernel=np.zeros((4096, 4096), np.int16),
        kernel_step=np.float32(1),
        kernel_bits=np.int32(1),
        bias=None,
        bias_step=None,
        bias_bits=None,
        input_mask=np.arange(4096) < kept,
        output_mask=np.ones(4096, bool),
        group_axis="input",
    )
    layer.kernel[:kept] = 1
    data = bcdl_jax.codec.encode({"head": layer})
    assert len(data) < 40 + 40 * kept
    assert_same(bcdl_jax.codec.decode(data, {"head": layer}), {"head": layer})


def test_sets_that_take_almost_no_bits_are_read_by_both_decoders():
    """Patterns whose lists and bitmaps have more numbers than a reader allows for their bytes."""
    array = np.zeros((60_000, 2), np.float32)
    array[: len(array) // 2] = 1
    every = np.zeros(60_000, np.float32)
    every[::2] = 1
    data = bcdl_jax.codec.encode({"half": array, "second": every})
    assert_same(bcdl_jax.codec.decode(data, {"half": array, "second": every}), {"half": array, "second": every})
    for entry, value in zip(reference_decoder.decode(data)[1], (array, every), strict=True):
        np.testing.assert_array_equal(entry["value"], value)


def test_a_file_that_is_too_large_is_not_called_damaged(tmp_path, capsys):
    tree = {"a": np.zeros((1000, 1000), np.float32)}
    path = tmp_path / "zeros.bcdl"
    assert bcdl_jax.save(path, tree, names=True) < 40
    with pytest.raises(
        bcdl_jax.codec.CompressedFileError,
        match=r"too large: it takes 4,002,000 bytes in memory, and max_bytes is 4,001,999\.$",
    ):
        bcdl_jax.load(path, max_bytes=4_001_999)
    assert_same(bcdl_jax.load(path, max_bytes=4_002_000), tree)
    assert main(["inspect", str(path), "--max-bytes", "100"]) == 2
    assert "too large" in capsys.readouterr().err


def test_a_tree_beyond_the_default_limit_is_written_with_a_warning(monkeypatch):
    monkeypatch.setattr("bcdl_jax.codec.file.MAX_BYTES", 10**6)
    tree = {"a": np.zeros((1000, 1000), np.float32)}
    with pytest.warns(UserWarning, match="params takes 4,002,000 bytes in memory; load needs max_bytes=4002000"):
        data = bcdl_jax.codec.encode(tree)
    assert_same(bcdl_jax.codec.decode(data, tree, max_bytes=4_002_000), tree)


# Invalid files and params.


def with_checksum(data):
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"PK" + data[2:], "does not begin with BCDL"),
        (lambda data: data[:8], "does not begin with BCDL"),
        (lambda data: data[:4] + b"\7" + data[5:], "format version 7; this library reads version 1"),
        (lambda data: data[:-9] + b"x" + data[-8:], "checksum does not match"),
        (lambda data: with_checksum(data[:5] + b"\2" + data[6:]), "unknown flags"),
        (lambda data: with_checksum(data[:14] + data[-4:]), "bytes are missing"),
        (lambda data: with_checksum(data[:-4] + b"more" + data[-4:]), "damaged"),
    ],
)
def test_a_damaged_file_is_reported_in_one_sentence(change, message, tmp_path, capsys):
    tree = some_tree(np.random.default_rng(0))
    damaged = change(bcdl_jax.codec.encode(tree))
    with pytest.raises(bcdl_jax.codec.CompressedFileError, match=message):
        bcdl_jax.codec.decode(damaged, tree)
    path = tmp_path / "damaged.bcdl"
    path.write_bytes(damaged)
    assert main(["verify", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path}: ")


def test_a_template_that_does_not_fit_is_refused(net):
    _, params, _ = net
    reduced = bcdl_jax.reduce_precision(params, 0.25)
    data = bcdl_jax.codec.encode(reduced)
    with pytest.raises(bcdl_jax.codec.CompressedFileError, match="holds no names"):
        bcdl_jax.codec.decode(data)
    with pytest.raises(bcdl_jax.codec.CompressedFileError, match="holds 3 layers and arrays; the template has 1"):
        bcdl_jax.codec.decode(data, {"a": np.zeros(3)})
    with pytest.raises(bcdl_jax.codec.CompressedFileError, match="Entry 0 of the file is a layer of shape"):
        bcdl_jax.codec.decode(data, {name: np.zeros(3) for name in "abc"})
    with pytest.raises(
        bcdl_jax.codec.CompressedFileError,
        match=r"the template has 6\. The template must be the params of the variational",
    ):
        bcdl_jax.codec.decode(data, bcdl_jax.mean_weights(reduced))
    small = {"a": bcdl_jax.reduce_precision(make_posterior(jax.random.key(0), (3, 2), "input"), 0.25)}
    whole = {"a": make_posterior(jax.random.key(0), (4, 2), "input")}
    for stored, template, hint in (
        (small, whole, " A file of shrunk params needs the small params from shrink"),
        (whole, small, "$"),
    ):
        data = bcdl_jax.codec.encode(stored if stored is small else bcdl_jax.reduce_precision(stored, 0.25))
        with pytest.raises(
            bcdl_jax.codec.CompressedFileError, match=r"the template has a layer of shape \(., 2\)\." + hint
        ):
            bcdl_jax.codec.decode(data, template)


def test_a_layer_without_inputs_and_outputs(tmp_path):
    """A superfluous layer after ``shrink``."""
    dense, conv = (make_posterior(jax.random.key(0), shape, "output") for shape in ((0, 0), (3, 3, 0, 0)))
    for by_round_off in (False, True):
        tree = {"conv": conv, "dense": dense, "plain": jnp.zeros((3, 0))}
        reduce = (
            bcdl_jax.compression.reduce_precision_by_round_off
            if by_round_off
            else lambda t: bcdl_jax.reduce_precision(t, 1.0)
        )
        reduced = reduce(tree)
        data = bcdl_jax.codec.encode(reduced, names=True)
        assert_same(bcdl_jax.codec.decode(data), reduced)
        assert_same(bcdl_jax.codec.decode(data, tree), reduced)
        _, (entry, *_) = reference_decoder.decode(data)
        assert entry["kernel"].shape == (3, 3, 0, 0)
        assert bcdl_jax.codec.summarize(data)[0].kept == (3, 3, 0, 0)


def test_names_in_the_file_are_compared_with_those_of_the_template(key):
    inputs = jnp.ones((1, 4))

    def params(*names):
        return {name: bcdl_jax.Dense(4).init(key, inputs)["params"] for name in names}

    reduced = bcdl_jax.reduce_precision(params("first", "second"), 0.25)
    data = bcdl_jax.codec.encode(reduced, names=True)
    other = params("a", "b")
    with pytest.raises(
        bcdl_jax.codec.CompressedFileError, match="Entry 0 of the file is called first; the template has a"
    ):
        bcdl_jax.codec.decode(data, other)
    found = bcdl_jax.codec.decode(data, params("first", "second"))
    np.testing.assert_array_equal(found["second"]["posterior"].kernel, reduced["second"]["posterior"].kernel)
    assert set(bcdl_jax.codec.decode(bcdl_jax.codec.encode(reduced), other)) == {"a", "b"}

    # The file stores the layers without the entry "posterior" that the template has.
    bare = {name: layer["posterior"] for name, layer in reduced.items()}
    found = bcdl_jax.codec.decode(bcdl_jax.codec.encode(bare, names=True), params("first", "second"))
    np.testing.assert_array_equal(found["second"]["posterior"].kernel, bare["second"].kernel)


def test_an_array_called_value_keeps_its_name():
    """Only the value of an NNX variable, which has no other array, takes the name of the variable."""

    @flax.struct.dataclass
    class Attention:
        key: np.ndarray
        value: np.ndarray

    arrays = Attention(np.arange(3), np.arange(4))
    found = bcdl_jax.codec.decode(bcdl_jax.codec.encode({"attention": arrays}, names=True))
    np.testing.assert_array_equal(found["attention"]["value"], arrays.value)


def test_params_that_cannot_be_stored_are_refused(net, tmp_path):
    _, params, _ = net
    with pytest.raises(ValueError, match=r"a posterior at Dense_0; call reduce_precision first"):
        bcdl_jax.save(tmp_path / "a.bcdl", params)
    with pytest.raises(ValueError, match="The array at a is complex64"):
        bcdl_jax.save(tmp_path / "a.bcdl", {"a": np.zeros(2, np.complex64)})
    with pytest.raises(ValueError, match="holds a line feed"):
        bcdl_jax.save(tmp_path / "a.bcdl", {"a\nb": np.zeros(2)}, names=True)
    with pytest.raises(ValueError, match="holds half of a surrogate pair"):
        bcdl_jax.save(tmp_path / "a.bcdl", {"a\ud800": np.zeros(2)}, names=True)
    with pytest.raises(ValueError, match=r"The array at rng holds PRNG keys \(key<fry>\); save their numbers"):
        bcdl_jax.save(tmp_path / "a.bcdl", {"rng": jax.random.key(0)})
    reduced = bcdl_jax.reduce_precision(params, 0.25)
    layer = jax.tree.leaves(reduced, is_leaf=bcdl_jax.compression.is_layer)[0]
    with pytest.raises(ValueError, match="has nonzero integers at pruned inputs or outputs"):
        bcdl_jax.save(tmp_path / "a.bcdl", {"a": layer.replace(input_mask=jnp.zeros_like(layer.input_mask))})
    assert not list(tmp_path.iterdir())


def test_arrays_of_the_other_byte_order_are_stored():
    tree = {"a": np.arange(5, dtype=">i4"), "b": np.arange(5, dtype=">f8"), "c": np.ones(2, ">f2")}
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in tree.items()}
    assert_same(bcdl_jax.codec.decode(bcdl_jax.codec.encode(tree), tree), native)


def mutations(count, seed):
    """Damaged variants of some files. Every second one has a valid checksum."""
    rng = random.Random(seed)
    files = [
        bcdl_jax.codec.encode(some_tree(np.random.default_rng(number)), names=number % 2 == 1) for number in range(4)
    ]
    files.append(bcdl_jax.codec.encode({"a": np.arange(-40, 40, dtype=np.int8).reshape(8, 10), "b": np.float32(3)}))
    for number in range(count):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice([1, 1, 2, 5])):
            kind, place = rng.random(), rng.randrange(len(data)) if data else 0
            if kind < 0.6 and data:
                data[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
            elif kind < 0.75:
                del data[place : place + rng.choice([1, 2, 20, len(data)])]
            elif kind < 0.9:
                data[place:place] = rng.randbytes(rng.choice([1, 2, 20]))
            else:
                data = data[:place] + data[rng.randrange(len(data) + 1) :] if data else data
        yield with_checksum(bytes(data)) if number % 2 and len(data) > 4 else bytes(data)


def check_damaged_files(count, seed):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = 0
    for data in mutations(count, seed):
        try:
            summaries = bcdl_jax.codec.summarize(data, max_bytes=2**24)
        except bcdl_jax.codec.CompressedFileError:
            continue
        decoded += 1
        assert all(0 <= kept <= size for entry in summaries for kept, size in zip(entry.kept, entry.shape, strict=True))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert 0 < decoded < count / 2


def test_damaged_files_raise_one_error_or_decode():
    check_damaged_files(600, 0)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_100000_damaged_files_raise_one_error_or_decode(part):
    check_damaged_files(10_000, 1 + part)


# The command line.


def test_inspect_and_verify(net, tmp_path, capsys):
    _, params, _ = net
    reduced = bcdl_jax.reduce_precision(bcdl_jax.prune(params, 0.0, CHAIN), 0.25)
    path = tmp_path / "net.bcdl"
    size = bcdl_jax.save(path, reduced, names=True)
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: valid, 3 layers and arrays, {size} bytes\n"
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Dense_1" in out
    assert "5x4" in out
    assert f"{size} bytes" in out
    summaries = bcdl_jax.codec.summarize(path.read_bytes())
    assert 0.5 * size < sum(summary.bytes for summary in summaries) < size
    assert main(["inspect", str(tmp_path / "none.bcdl")]) == 2
    assert "cannot be read or written: No such file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["net.bcdl"]
    command = [sys.executable, "-m", "bcdl_jax", "inspect", str(path)]
    bcdl_jax.save(
        tmp_path / "mixed.bcdl",
        reduced | {"table": np.full((9, 5), 0.1, np.float32), "x": np.ones(2, np.float32), "y": np.float32([1, 0.1])},
        names=True,
    )
    assert "not rounded" not in out
    assert main(["inspect", str(tmp_path / "mixed.bcdl")]) == 0
    assert re.search(
        r"not rounded: 2 float32 arrays, 1\d\d bytes; the largest is table with 1\d\d bytes\n", capsys.readouterr().out
    )
    types = {
        summary.name: summary.dtype for summary in bcdl_jax.codec.summarize((tmp_path / "mixed.bcdl").read_bytes())
    }
    assert types == {
        "Dense_0/posterior": None,
        "Dense_1/posterior": None,
        "Dense_2/posterior": None,
        "table": "float32",
        "x": None,
        "y": "float32",
    }
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    bcdl_jax.save(tmp_path / "letters.bcdl", {"größe": np.ones(3)}, names=True)
    command[-1] = str(tmp_path / "letters.bcdl")
    shown = subprocess.run(command, capture_output=True, check=True, env=ascii_only).stdout
    assert rb"gr\xf6\xdfe" in shown
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # As a reader such as head does.
        assert process.stderr.read() == b""
    for target in (tmp_path / "none" / "net.bcdl", path / "net.bcdl", tmp_path):
        with pytest.raises(OSError, match=f"'{target}'"):
            bcdl_jax.save(target, reduced)
