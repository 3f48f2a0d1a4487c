"""Shared by the tests of training: a data set, a likelihood, and states of several seeds."""

import jax
import jax.numpy as jnp
import optax

import bcdl_jax
from tests.conftest import SmallNet

EXAMPLES, BATCH = 40, 8


def nll(params, batch, key):
    logits = SmallNet().apply({"params": params}, batch[0], deterministic=False, rngs={"noise": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def validation_error(params, held_out):
    return 100 * jnp.mean(jnp.argmax(SmallNet().apply({"params": params}, held_out[0]), -1) != held_out[1])


def setup(optimizer, seeds=(0, 1, 2), likelihood=nll, model=None, **options):
    model = model or SmallNet()
    step = bcdl_jax.train.make_train_step(likelihood, optimizer, num_examples=EXAMPLES, **options)
    epoch = bcdl_jax.train.make_train_epoch(step, batch_size=BATCH)

    @jax.jit
    @jax.vmap
    def create(seed):
        key = jax.random.key(seed)
        return bcdl_jax.train.create_train_state(
            model.init(key, jnp.ones((1, 6)))["params"], optimizer, jax.random.fold_in(key, 1)
        )

    return step, epoch, create(jnp.array(seeds))


def copy(tree):
    return jax.tree.map(jnp.copy, tree)
