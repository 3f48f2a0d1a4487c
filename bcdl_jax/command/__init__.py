"""The compression of a network from the command line, for ``python -m bcdl_jax compress``."""

from bcdl_jax.command.arguments import add_arguments
from bcdl_jax.command.files import CommandError, read_arrays, read_params
from bcdl_jax.command.running import run_compress

__all__ = ["CommandError", "add_arguments", "read_arrays", "read_params", "run_compress"]
