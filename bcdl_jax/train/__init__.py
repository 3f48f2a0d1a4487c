"""Training: the objective, a pure step, epochs, many seeds, many devices, and networks that shrink while they are trained."""

from bcdl_jax._backend import on_cpu
from bcdl_jax._tree import is_key
from bcdl_jax.train.averaging import ParamsEmaState, averaged_params, params_ema
from bcdl_jax.train.batches import epoch_rows, take_batch
from bcdl_jax.train.ensemble import compile_ensemble, train_ensemble
from bcdl_jax.train.fit import FitResult, fit
from bcdl_jax.train.fit_config import FitConfig
from bcdl_jax.train.fit_phase import FitReport
from bcdl_jax.train.kinds import parameter_fields, scale_by_kind
from bcdl_jax.train.loop import make_train_epoch, make_train_loop
from bcdl_jax.train.losses import GaussianLoss, Loss, SigmoidLoss, SoftmaxLoss
from bcdl_jax.train.mesh import fetch, jit_step, make_mesh, place_data, place_state, process_rows, replicated
from bcdl_jax.train.objective import kl_warmup, negative_elbo
from bcdl_jax.train.pmap import make_pmap_train_step
from bcdl_jax.train.reports import EnsembleReport, EpochReport
from bcdl_jax.train.seeds import each_seed, select_seed, stack_seeds
from bcdl_jax.train.settings import make_step_by_setting, with_setting
from bcdl_jax.train.shrinking_config import ShrinkingConfig
from bcdl_jax.train.state import TrainState, create_train_state
from bcdl_jax.train.step import keep_masks, make_train_step
from bcdl_jax.train.while_shrinking import ShrunkTraining, leave_out_pruned, prune_and_shrink, prune_state

__all__ = [
    "EnsembleReport",
    "EpochReport",
    "FitConfig",
    "FitReport",
    "FitResult",
    "GaussianLoss",
    "Loss",
    "ParamsEmaState",
    "ShrinkingConfig",
    "ShrunkTraining",
    "SigmoidLoss",
    "SoftmaxLoss",
    "TrainState",
    "averaged_params",
    "compile_ensemble",
    "create_train_state",
    "each_seed",
    "epoch_rows",
    "fetch",
    "fit",
    "is_key",
    "jit_step",
    "keep_masks",
    "kl_warmup",
    "leave_out_pruned",
    "make_mesh",
    "make_pmap_train_step",
    "make_step_by_setting",
    "make_train_epoch",
    "make_train_loop",
    "make_train_step",
    "negative_elbo",
    "on_cpu",
    "parameter_fields",
    "params_ema",
    "place_data",
    "place_state",
    "process_rows",
    "prune_and_shrink",
    "prune_state",
    "replicated",
    "scale_by_kind",
    "select_seed",
    "stack_seeds",
    "take_batch",
    "train_ensemble",
    "with_setting",
]
