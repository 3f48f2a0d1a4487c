"""Compression within a budget: an error, a size or an amount of work in, a small network out."""

from bcdl_jax.budget.compressed import Compressed, CompressionReport, EntryReport
from bcdl_jax.budget.compressing import compress
from bcdl_jax.budget.errors import Increase, squared_error, wrong_class, wrong_label
from bcdl_jax.budget.page import report_page
from bcdl_jax.budget.search import Point, pareto_front

__all__ = [
    "Compressed",
    "CompressionReport",
    "EntryReport",
    "Increase",
    "Point",
    "compress",
    "pareto_front",
    "report_page",
    "squared_error",
    "wrong_class",
    "wrong_label",
]
