"""Networks and weights for other runtimes and frameworks."""

from bcdl_jax.export.onnx import export_onnx
from bcdl_jax.export.safetensors import export_safetensors, torch_state_dict
from bcdl_jax.export.stablehlo import export_stablehlo, load_stablehlo

__all__ = [
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "load_stablehlo",
    "torch_state_dict",
]
