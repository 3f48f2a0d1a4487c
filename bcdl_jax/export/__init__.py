"""Networks and weights as files for other runtimes and frameworks."""

from bcdl_jax.export.network_file import load_network, save_network
from bcdl_jax.export.onnx import export_onnx
from bcdl_jax.export.safetensors import export_safetensors
from bcdl_jax.export.stablehlo import export_stablehlo, load_stablehlo
from bcdl_jax.export.torch import torch_state_dict

__all__ = [
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "load_network",
    "load_stablehlo",
    "save_network",
    "torch_state_dict",
]
