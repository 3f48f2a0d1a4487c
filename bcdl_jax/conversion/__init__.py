"""Any network made variational: ``variational`` converts a JAX function and its params."""

from bcdl_jax.conversion.model import VariationalModel, variational
from bcdl_jax.conversion.plan import ConversionPlan, LeafPlan

__all__ = ["ConversionPlan", "LeafPlan", "VariationalModel", "variational"]
