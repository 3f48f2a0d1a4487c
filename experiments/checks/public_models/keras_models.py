"""Models of Keras, with its JAX backend: applications at small widths, and models of its layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Keras reads the variable when it is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
from keras.src.applications import convnext as convnexts
from keras.src.applications import densenet as densenets
from keras.src.applications import efficientnet as efficientnets
from keras.src.applications import resnet as resnets

from experiments.checks.public_models.model import PublicModel, Units, images, sequences
from experiments.runtime.errors import UserError

WIDTH, HEADS, CLASSES = 24, 4, 5
ARGUMENTS: dict[str, Any] = {
    "input_shape": (32, 32, 3),
    "weights": None,
    "classes": CLASSES,
    "classifier_activation": None,
}

if keras.backend.backend() != "jax":
    raise UserError(f"KERAS_BACKEND is {keras.backend.backend()!r}; it must be 'jax'.")


def stateless(make: Callable[[], keras.Model], inputs: jax.Array, **hints: Any) -> PublicModel:
    """A model of a Keras model. Its params hold the weights by layer and name."""
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    model = make()
    # Integers are states of random number generators. They stay in the function.
    integers = {weight.path: weight.value for weight in model.non_trainable_variables if "int" in weight.dtype}
    params: dict[str, dict[str, jax.Array]] = {}
    for weight in model.variables:
        if weight.path not in integers:
            layer, _, name = weight.path.rpartition("/")
            params.setdefault(layer, {})[name] = weight.value

    def apply(tree: Any, x: jax.Array) -> jax.Array:
        values = integers | {f"{layer}/{name}": value for layer, part in tree.items() for name, value in part.items()}
        parts = [
            [values[weight.path] for weight in part]
            for part in (model.trainable_variables, model.non_trainable_variables)
        ]
        return model.stateless_call(*parts, x, training=False)[0]

    return PublicModel(apply, params, (inputs,), kept=frozenset([CLASSES]), averages=("'moving_",), **hints)


def mobilenet_v2() -> keras.Model:
    """MobileNetV2 of the smallest width."""
    return keras.applications.MobileNetV2(**ARGUMENTS, alpha=0.35)


def mobilenet_v3() -> keras.Model:
    """The small MobileNetV3 at 0.35 of its width."""
    return keras.applications.MobileNetV3Small(**ARGUMENTS, alpha=0.35)


def efficientnet() -> keras.Model:
    """An EfficientNet of a quarter of the width and of the depth."""
    return efficientnets.EfficientNet(0.25, 0.25, 32, **ARGUMENTS)


def densenet() -> keras.Model:
    """A DenseNet with four blocks of two layers."""
    return densenets.DenseNet([2, 2, 2, 2], **ARGUMENTS)


def resnet() -> keras.Model:
    """A ResNet with two stacks of bottleneck blocks."""

    def stacks(x: Any) -> Any:
        x = resnets.stack_residual_blocks_v1(x, 8, 2, stride1=1, name="conv2")
        return resnets.stack_residual_blocks_v1(x, 12, 1, name="conv3")

    return resnets.ResNet(stacks, False, True, **ARGUMENTS)


def convnext() -> keras.Model:
    """A ConvNeXt with one block in each stage."""
    return convnexts.ConvNeXt([1, 1, 1, 1], [8, 12, 16, 20], **ARGUMENTS)


def unet() -> keras.Model:
    """A U-Net with a transposed convolution and a second output."""
    layers = keras.layers
    inputs = layers.Input((16, 16, 3))
    first = layers.Conv2D(12, 3, padding="same", activation="relu")(inputs)
    low = layers.SeparableConv2D(16, 3, strides=2, padding="same", activation="swish")(first)
    low = layers.BatchNormalization()(low)
    high = layers.Concatenate()([layers.Conv2DTranspose(12, 3, strides=2, padding="same")(low), first])
    high = layers.LeakyReLU()(layers.UpSampling2D(2, interpolation="bilinear")(high))
    return keras.Model(inputs, [layers.Conv2D(CLASSES, 1)(high), layers.GlobalMaxPooling2D()(low)])


def recurrent() -> keras.Model:
    """An LSTM in both directions and a GRU over a sequence."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((6, 7)),
            layers.Bidirectional(layers.LSTM(WIDTH, return_sequences=True)),
            layers.GRU(WIDTH),
            layers.Dense(CLASSES),
        ]
    )


def attention() -> keras.Model:
    """A block of a transformer."""
    layers = keras.layers
    x = inputs = layers.Input((6, 7))
    x = layers.Dense(WIDTH)(x)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x))
    x = layers.Add()([x, layers.Dense(WIDTH)(layers.Dense(2 * WIDTH, activation="gelu")(x))])
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


def models() -> dict[str, Callable[[], PublicModel]]:
    """The models by name, as functions that make them."""
    steps = sequences(6, 7)
    gates = {4 * WIDTH: Units(repeats=4), 3 * WIDTH: Units(repeats=3)}
    pictures = images(32)
    return {
        "mobilenet_v2": lambda: stateless(mobilenet_v2, pictures),
        "mobilenet_v3": lambda: stateless(mobilenet_v3, pictures),
        "efficientnet": lambda: stateless(efficientnet, pictures),
        "densenet": lambda: stateless(densenet, pictures),
        "resnet": lambda: stateless(resnet, pictures),
        "convnext": lambda: stateless(convnext, pictures),
        "unet": lambda: stateless(unet, images(16)),
        "lstm_gru": lambda: stateless(recurrent, steps, units=gates),
        "attention": lambda: stateless(attention, steps, heads=HEADS),
    }
