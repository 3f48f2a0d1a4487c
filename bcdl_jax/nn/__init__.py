"""Variational Linen layers, max pooling, and the linear maps that the layers apply."""

from bcdl_jax.nn.layers import Conv, Dense
from bcdl_jax.nn.linear_maps import ConvolutionMap
from bcdl_jax.nn.pooling import max_pool

__all__ = [
    "Conv",
    "ConvolutionMap",
    "Dense",
    "max_pool",
]
