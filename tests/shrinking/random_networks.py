"""Random chains of layers of many kinds, with random structured zeros, as functions of a params tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Builder:
    """Draws layers and collects their params. A network is a list of functions (params, x) -> x."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params = {}

    def array(self, name, shape, zero_axes=(), scale=None):
        """A random array in which each index along each of ``zero_axes`` is zero with some probability."""
        fan_in = max(1, int(np.prod(shape[:-1])))
        value = self.rng.normal(size=shape) * (scale or fan_in**-0.5)
        for axis in zero_axes:
            zero = self.rng.random(shape[axis]) < self.rng.choice([0, 0.2, 0.4])
            np.moveaxis(value, axis, 0)[zero] = 0
        key = f"{len(self.params)}_{name}"
        self.params[key] = value.astype(np.float32)
        return key

    def vector(self, name, size, like=None):
        """A bias or scale. In most cases it is zero where all weights along the last axis of ``like`` are zero."""
        key = self.array(name, (size,), scale=0.5)
        if like is not None and self.rng.random() < 0.7:
            dead = ~self.params[like].any(tuple(range(self.params[like].ndim - 1)))
            if len(dead) == size:
                self.params[key][dead] = 0
        return key

    # Each layer takes the shape of an example and returns (function, new shape).

    def activation(self, shape):
        kind = self.rng.choice(["relu", "gelu", "tanh", "leaky", "sigmoid", "none", "square"])
        functions = {
            "relu": jax.nn.relu,
            "gelu": jax.nn.gelu,
            "tanh": jnp.tanh,
            "leaky": jax.nn.leaky_relu,
            "sigmoid": jax.nn.sigmoid,
            "none": lambda x: x,
            "square": jnp.square,
        }
        return (lambda params, x: functions[kind](x)), shape

    def convolution(self, shape, keep_shape=False):
        rank, channels = len(shape) - 1, shape[-1]
        groups = int(self.rng.choice([1, 1, 1, channels, 2 if channels % 2 == 0 else 1]))
        out = channels if keep_shape else groups * int(self.rng.integers(1, max(2, 9 // groups)))
        if out % groups:
            groups = 1
        window = tuple(int(self.rng.integers(1, 4)) for _ in range(rank))
        kernel = self.array("conv", (*window, channels // groups, out), (-1, -2))
        bias = self.vector("bias", out, kernel) if self.rng.random() < 0.7 else None
        strides = (1,) * rank if keep_shape else tuple(int(self.rng.choice([1, 1, 2])) for _ in range(rank))
        dilation = tuple(int(self.rng.choice([1, 1, 2])) for _ in range(rank))
        spread = (1,) * rank
        if not keep_shape and self.rng.random() < 0.15:
            spread, strides = (2,) * rank, (1,) * rank  # A transposed convolution.
        padding = "SAME"
        if not keep_shape:
            roll = self.rng.random()
            if roll < 0.3:
                padding = tuple((int(self.rng.integers(0, 3)), int(self.rng.integers(0, 3))) for _ in range(rank))
            elif roll < 0.6:
                padding = "VALID"
        if isinstance(padding, str) and max(spread) > 1:
            padding = ((2, 2),) * rank
        letters = "DHW"[3 - rank :]
        numbers = ("N" + letters + "C", letters + "IO", "N" + letters + "C")

        def apply(params, x):
            x = lax.conv_general_dilated(
                x, params[kernel], strides, padding, spread, dilation, numbers, feature_group_count=groups
            )
            return x if bias is None else x + params[bias]

        return apply, self.probe(apply, shape)

    def dense(self, shape, out=None):
        out = out or int(self.rng.integers(2, 10))
        kernel = self.array("dense", (shape[-1], out), (0, 1))
        bias = self.vector("bias", out, kernel)
        return (lambda params, x: x @ params[kernel] + params[bias]), (*shape[:-1], out)

    def batch_norm(self, shape):
        names = {name: self.vector(name, shape[-1]) for name in ("mean", "scale", "bias")}
        variance = self.vector("variance", shape[-1])
        self.params[variance] = np.abs(self.params[variance]) + 0.5
        if self.rng.random() < 0.7:
            zero = self.rng.random(shape[-1]) < 0.4
            self.params[names["scale"]][zero] = 0
            self.params[names["bias"]][zero & (self.rng.random(shape[-1]) < 0.6)] = 0

        def apply(params, x):
            x = (x - params[names["mean"]]) * lax.rsqrt(params[variance] + 1e-3)
            return x * params[names["scale"]] + params[names["bias"]]

        return apply, shape

    def layer_norm(self, shape):
        scale, bias = self.vector("scale", shape[-1]), self.vector("bias", shape[-1])
        zero = self.rng.random(shape[-1]) < 0.3
        self.params[scale][zero] = 0
        self.params[bias][zero] = 0

        def apply(params, x):
            mean = x.mean(-1, keepdims=True)
            spread = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
            return (x - mean) * lax.rsqrt(spread + 1e-3) * params[scale] + params[bias]

        return apply, shape

    def pool(self, shape):
        rank = len(shape) - 1
        if min(shape[:-1]) < 2:
            return self.activation(shape)
        window = tuple(int(self.rng.integers(1, 3)) for _ in range(rank))
        strides = tuple(int(self.rng.integers(1, 3)) for _ in range(rank))
        padding = str(self.rng.choice(["SAME", "VALID"]))
        initial, operation = (-jnp.inf, lax.max) if self.rng.random() < 0.5 else (0.0, lax.add)

        def apply(params, x):
            return lax.reduce_window(x, initial, operation, (1, *window, 1), (1, *strides, 1), padding)

        return apply, self.probe(apply, shape)

    def residual(self, shape):
        make = self.convolution if len(shape) > 1 else self.dense
        first, middle = make(shape)[0:2] if len(shape) == 1 else make(shape, keep_shape=True)
        act, _ = self.activation(middle)
        second, last = self.dense(middle, shape[-1]) if len(shape) == 1 else make(middle, keep_shape=True)
        assert last == shape
        return (lambda params, x: x + second(params, act(params, first(params, x)))), shape

    def concatenation(self, shape):
        make = self.dense if len(shape) == 1 else lambda s: self.convolution(s, keep_shape=True)
        (first, one), (second, two) = make(shape), make(shape)
        apply = lambda params, x: jnp.concatenate([first(params, x), second(params, x)], -1)  # noqa: E731
        return apply, (*shape[:-1], one[-1] + two[-1])

    def split(self, shape):
        if shape[-1] < 2:
            return self.activation(shape)
        at = int(self.rng.integers(1, shape[-1]))
        swap = lambda params, x: jnp.concatenate([*jnp.split(x, [at], -1)][::-1], -1)  # noqa: E731
        gate = lambda params, x: x[..., :at] * x[..., -1:]  # noqa: E731
        return (swap, shape) if self.rng.random() < 0.5 else (gate, (*shape[:-1], at))

    def attention(self, shape):
        """Self-attention on [tokens, features]."""
        heads, size = int(self.rng.integers(1, 4)), int(self.rng.integers(1, 4))
        fused = self.rng.random() < 0.5
        names = [self.array(name, (shape[-1], heads * size), (1,)) for name in ("query", "key", "value")]
        biases = [self.vector("bias", heads * size, name) for name in names]
        out = self.array("out", (heads * size, shape[-1]), (0, 1))
        for name in names[: self.rng.integers(0, 4)]:  # Some heads become zero as a whole.
            head = int(self.rng.integers(0, heads))
            self.params[name].reshape(shape[-1], heads, size)[:, head] = 0

        def apply(params, x):
            def project(name, bias):
                return (x @ params[name] + params[bias]).reshape(*x.shape[:-1], heads, size)

            if fused:
                joined = jnp.concatenate([params[name] for name in names], 1)
                parts = jnp.split(x @ joined + jnp.concatenate([params[bias] for bias in biases]), 3, -1)
                query, key, value = (part.reshape(*x.shape[:-1], heads, size) for part in parts)
            else:
                query, key, value = (project(name, bias) for name, bias in zip(names, biases, strict=True))
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(size), -1)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
            return x + mixed.reshape(*x.shape[:-1], heads * size) @ params[out]

        return apply, shape

    # Layers that only extended networks have.

    def recurrence(self, shape):
        """A scan over stacked weights."""
        stacked = self.array("stacked", (3, shape[-1], shape[-1]), (2,))
        reverse, keeps_all = bool(self.rng.random() < 0.5), bool(self.rng.random() < 0.5)

        def apply(params, x):
            last, every = lax.scan(
                lambda carry, weights: (jnp.tanh(carry @ weights) + carry, carry), x, params[stacked], reverse=reverse
            )
            return last + every.sum(0) if keeps_all else last

        return apply, shape

    def experts(self, shape):
        """A mixture of experts: an einsum of several operands."""
        count, out = int(self.rng.integers(2, 4)), int(self.rng.integers(2, 7))
        gate, kernel = self.array("gate", (shape[-1], count)), self.array("experts", (count, shape[-1], out), (1, 2))

        def apply(params, x):
            return jnp.einsum("...e,...d,edh->...h", jax.nn.softmax(x @ params[gate]), x, params[kernel])

        return apply, (*shape[:-1], out)

    def mixed_types(self, shape):
        """A product in half precision or of integers, and a table that is read by computed indices."""
        kernel, table = self.array("mixed", (shape[-1], shape[-1]), (1,)), self.array("table", (5, shape[-1]), (1,))
        dtype = self.rng.choice(["bfloat16", "float16", "int8", "int32"])

        def apply(params, x):
            scale = 1 if "float" in dtype else 3
            to_type = (lambda value: value) if "float" in dtype else jnp.round
            wide = jnp.float32 if "float" in dtype else jnp.int32
            small = jnp.clip(to_type(scale * x), -40, 40).astype(dtype)
            product = lax.dot_general(
                small,
                to_type(scale * params[kernel]).astype(dtype),
                (((x.ndim - 1,), (0,)), ((), ())),
                preferred_element_type=wide,
            )
            places = jnp.clip(jnp.abs(product[..., 0]), 0, 4).astype(jnp.int32)
            # The place must not depend on the last bits of the product.
            is_safe = abs(product[..., :1] - jnp.round(product[..., :1])) > 0.05 if "float" in dtype else True
            return x + product.astype(jnp.float32) / scale**2 + jnp.where(is_safe, params[table][places], 0.0)

        return apply, shape

    def masking(self, shape):
        """Selections by combined conditions, and padding."""
        low = float(self.rng.normal())

        def apply(params, x):
            padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]
            condition = jnp.where(x > low, padded > 0, ~(x < -1)) & (x < 3)
            return jnp.where(condition, x, padded / 2)

        return apply, shape

    def causal_attention(self, shape):
        """Attention of one head on [tokens, features], with a mask."""
        names = [self.array(name, (shape[-1], shape[-1]), (1,)) for name in ("query", "key", "value")]

        def apply(params, x):
            query, key, value = (x @ params[name] for name in names)
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), (x.shape[0], x.shape[1], x.shape[1]))
            scores = jnp.where(mask, jnp.einsum("bqd,bkd->bqk", query, key), -1e9)
            return x + jax.nn.softmax(scores) @ value

        return apply, shape

    def probe(self, apply, shape):
        return jax.eval_shape(apply, self.params, jax.ShapeDtypeStruct((2, *shape), jnp.float32)).shape[1:]


def random_network(seed, extended=False):
    """A network of up to eight layers: (apply, params, inputs). Extended networks also have masks, scans, einsums and mixed types."""
    builder = Builder(seed)
    rng = builder.rng
    rank = int(rng.choice([0, 1, 2, 2, 2, 3]))
    shape = (*(int(rng.integers(3, 7)) for _ in range(rank)), int(rng.integers(1, 7)))
    inputs = rng.normal(size=(3, *shape)).astype(np.float32)
    layers = []

    def add(kind, *args):
        layer, new = getattr(builder, kind)(shape, *args)
        if 0 in new:
            return shape
        layers.append(layer)
        return new

    spatial = ["convolution", "convolution", "batch_norm", "pool", "residual", "concatenation", "split"]
    flat = ["dense", "dense", "layer_norm", "batch_norm", "residual", "concatenation", "split"]
    for _ in range(int(rng.integers(1, 5))):
        shape = add(str(rng.choice(spatial if rank else flat)))
        shape = add("activation")
    if rank:
        ending = rng.choice(["flatten", "mean", "tokens", "transposed"])
        if ending == "flatten":
            layers.append(lambda params, x: x.reshape(x.shape[0], -1))
            shape = (int(np.prod(shape)),)
        elif ending == "mean":
            layers.append(lambda params, x: x.mean(tuple(range(1, x.ndim - 1))))
            shape = shape[-1:]
        elif ending == "transposed":
            layers.append(lambda params, x: jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)[:, ::-1])
            shape = (int(np.prod(shape)),)
        else:
            layers.append(lambda params, x: x.reshape(x.shape[0], -1, x.shape[-1]))
            shape = (int(np.prod(shape[:-1])), shape[-1])
            for kind in ("layer_norm", "attention", "dense", *["causal_attention"] * extended):
                shape = add(kind)
            layers.append(lambda params, x: x[:, 0])
            shape = shape[-1:]
    for _ in range(int(rng.integers(1, 3))):
        shape = add(str(rng.choice(flat)))
        shape = add("activation")
        if extended:
            shape = add(str(rng.choice(["recurrence", "experts", "mixed_types", "masking"])))
    shape = add("dense")

    def apply(params, x):
        for layer in layers:
            x = layer(params, x)
        return x

    return apply, builder.params, inputs
