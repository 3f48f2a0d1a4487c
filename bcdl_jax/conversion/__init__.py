"""Any network made variational: ``variational`` converts a JAX function and its params."""

from bcdl_jax.conversion.model import VariationalModel, variational
from bcdl_jax.conversion.plan import ConversionPlan, LeafPlan
from bcdl_jax.conversion.prediction import Prediction, predict

__all__ = ["ConversionPlan", "LeafPlan", "Prediction", "VariationalModel", "predict", "variational"]
