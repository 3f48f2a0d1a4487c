"""The networks of the experiments in PyTorch, for comparison: with the same layers, start values, objective and optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bcdl_jax.priors import GroupNormalJeffreysPosterior


class _Variational(nn.Module):
    """The common part of both kinds of layer: the parameters, their KL divergence and the limit of the variances."""

    def __init__(self, posterior: GroupNormalJeffreysPosterior, kernel_order: tuple[int, ...]):
        """Copies the start values.

        Args:
          posterior: The start values.
          kernel_order: The kernel's axes in PyTorch's order.
        """
        super().__init__()

        def parameter(value: Any, order: tuple[int, ...] = (0,)) -> nn.Parameter:
            return nn.Parameter(torch.from_numpy(np.array(np.transpose(value, order), np.float32, order="C")))

        self.kernel_mean = parameter(posterior.kernel_mean, kernel_order)
        self.kernel_log_variance = parameter(posterior.kernel_log_variance, kernel_order)
        self.bias_mean = parameter(posterior.bias_mean)
        self.bias_log_variance = parameter(posterior.bias_log_variance)
        self.scale_mean = parameter(posterior.scale_mean)
        self.scale_log_variance = parameter(posterior.scale_log_variance)
        self.clip_var = posterior.clip_var

    def sample_scale(self, examples: int) -> torch.Tensor:
        """One draw of the scales per example, [examples, groups]."""
        noise = torch.randn(examples, len(self.scale_mean), device=self.scale_mean.device)
        return self.scale_mean + torch.exp(0.5 * self.scale_log_variance) * noise

    def kl_divergence(self) -> torch.Tensor:
        """The KL divergence from the normal-Jeffreys prior in nats, with the approximation of [M17 eq. 14] for the scales.

        The formula is ``bcdl_jax.priors.log_uniform_kl`` in PyTorch.
        """
        log_alpha = self.scale_log_variance - torch.log(self.scale_mean**2 + 1e-8)
        scale_kl = 0.63576 - 0.63576 * torch.sigmoid(1.87320 + 1.48695 * log_alpha) + 0.5 * F.softplus(-log_alpha)
        return (
            scale_kl.sum()
            + _gaussian_kl(self.kernel_mean, self.kernel_log_variance)
            + _gaussian_kl(self.bias_mean, self.bias_log_variance)
        )

    @torch.no_grad()
    def clip_variances(self) -> None:
        """Reduces the variances of weights and biases to at most ``clip_var``."""
        if self.clip_var is not None:
            self.kernel_log_variance.clamp_(max=math.log(self.clip_var))
            self.bias_log_variance.clamp_(max=math.log(self.clip_var))


class VariationalLinear(_Variational):
    """A dense layer with one scale per example and input. Inputs are [examples, in]."""

    def __init__(self, posterior: GroupNormalJeffreysPosterior):
        super().__init__(posterior, (1, 0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs * self.sample_scale(len(inputs))
        mean = F.linear(inputs, self.kernel_mean, self.bias_mean)
        variance = F.linear(inputs * inputs, torch.exp(self.kernel_log_variance), torch.exp(self.bias_log_variance))
        return mean + torch.sqrt(variance + 1e-8) * torch.randn_like(mean)


class VariationalConv2d(_Variational):
    """A convolution with one scale per example and output channel. Inputs are [examples, in, height, width]."""

    def __init__(self, posterior: GroupNormalJeffreysPosterior, padding: int):
        super().__init__(posterior, (3, 2, 0, 1))
        self.padding = padding

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mean = F.conv2d(inputs, self.kernel_mean, self.bias_mean, padding=self.padding)
        variance = F.conv2d(
            inputs * inputs,
            torch.exp(self.kernel_log_variance),
            torch.exp(self.bias_log_variance),
            padding=self.padding,
        )
        scale = self.sample_scale(len(inputs))[:, :, None, None]
        return scale * (mean + torch.sqrt(variance + 1e-8) * torch.randn_like(mean))


def _gaussian_kl(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    return 0.5 * (torch.exp(log_variance) + mean**2 - 1 - log_variance).sum()


def network(
    posteriors: Sequence[GroupNormalJeffreysPosterior],
    *,
    padding: int = 0,
    pool_after: tuple[int, ...] = (),
    batch_norm: bool = False,
) -> nn.Sequential:
    """A network of convolutions, then dense layers, with ReLU between all of them.

    Args:
      posteriors: The start values of the layers in the order of the data flow, of NumPy or JAX arrays. Convolutions have output groups,
        dense layers have input groups.
      padding: The padding of the convolutions at each side.
      pool_after: The indices of the convolutions that a pooling of 2 x 2 follows.
      batch_norm: True to normalise the outputs of each convolution. Training does not read moving averages, so there are none.

    Returns:
      A module from images [examples, channels, height, width] to class scores [examples, classes]. Without convolutions, the images may
      have any shape.
    """
    convolutions = [posterior for posterior in posteriors if posterior.group_axis == "output"]
    dense = [posterior for posterior in posteriors if posterior.group_axis == "input"]
    layers: list[nn.Module] = []
    channels = None
    for number, posterior in enumerate(convolutions):
        channels = posterior.kernel_mean.shape[-1]
        layers.append(VariationalConv2d(posterior, padding))
        layers += [nn.BatchNorm2d(channels, track_running_stats=False)] if batch_norm else []
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(2)] if number in pool_after else []
    layers.append(nn.Flatten())
    for number, posterior in enumerate(dense):
        first = _channels_first(posterior, channels) if number == 0 and channels is not None else posterior
        layers += [VariationalLinear(first), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _channels_first(posterior: GroupNormalJeffreysPosterior, channels: int) -> GroupNormalJeffreysPosterior:
    """The first dense layer after convolutions, with its inputs reordered from (position, channel) to (channel, position)."""

    def moved(value: Any) -> np.ndarray:
        value = np.asarray(value)
        return value.reshape(-1, channels, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)

    names = ("kernel_mean", "kernel_log_variance", "scale_mean", "scale_log_variance")
    return posterior.replace(**{name: moved(getattr(posterior, name)) for name in names})  # type: ignore[attr-defined]


def epoch(
    net: nn.Sequential,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    learning_rate: float,
    device: str,
    dtype: str,
    compiled: bool,
) -> Callable[[], float]:
    """Builds the training of one epoch.

    Args:
      net: The network, from ``network``. It is trained in place.
      images: The images, [n, height, width, channels] of uint8.
      labels: The classes of the images, [n].
      batch_size: The number of examples per step.
      learning_rate: The learning rate of Adam.
      device: The device, "cpu" or "cuda".
      dtype: The dtype of the computation, "float32" or "bfloat16" (autocast). Parameters are float32.
      compiled: True to compile the loss and its gradient with ``torch.compile``, False for eager PyTorch.

    Returns:
      A function that trains one epoch and returns its mean loss.
    """
    torch.set_float32_matmul_precision("high")  # XLA does the same on a GPU. On a CPU it has no effect.
    net.to(device)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    targets = torch.from_numpy(labels.astype(np.int64)).to(device)
    layers = [layer for layer in net if isinstance(layer, _Variational)]
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, fused=True)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(images.float() / 127.5 - 1)
        kl = sum((layer.kl_divergence() for layer in layers), start=torch.zeros((), device=device))
        return F.cross_entropy(logits.float(), labels) + kl / len(targets)

    loss_function: Callable[..., torch.Tensor] = torch.compile(loss_of) if compiled else loss_of

    def run() -> float:
        order = torch.randperm(len(targets), device=device)
        steps, total = len(targets) // batch_size, torch.zeros((), device=device)
        for rows in order[: steps * batch_size].split(batch_size):
            optimizer.zero_grad()
            loss = loss_function(inputs[rows], targets[rows])
            loss.backward()
            optimizer.step()
            for layer in layers:
                layer.clip_variances()
            total += loss.detach()
        return float(total) / steps

    return run
