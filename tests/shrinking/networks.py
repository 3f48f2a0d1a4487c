"""Small networks with structured zeros, and helpers for their reports."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import numpy as np


def numpy_tree(tree):
    return jax.tree.map(np.array, tree)


def shapes_after(report):
    return {leaf.path: leaf.after for leaf in report.leaves}


def dense_chain(params, x):
    layers = sorted(params)
    for name in layers[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params[layers[-1]]["kernel"] + params[layers[-1]]["bias"]


def random_chain(seed, widths=(7, 9, 8, 6, 3)):
    rng = np.random.default_rng(seed)
    params = {}
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        kernel, bias = rng.normal(size=(fan_in, fan_out)), rng.normal(size=fan_out)
        kernel[rng.random(fan_in) < 0.3] = 0
        if number < len(widths) - 2:
            kernel[:, rng.random(fan_out) < 0.3] = 0
            kernel[0, rng.integers(fan_out)] = 1  # At least one weight is left.
        params[f"layer{number}"] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return params


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for width, stride in ((8, 1), (12, 2)):
            y = nn.relu(norm()(nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
            if stride > 1:
                x = norm()(nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(4)(x.mean((1, 2)))
