import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from bcdl_jax._tree import map_named_layers
from bcdl_jax.graph.counting import multiply_adds, multiply_adds_by_owner
from bcdl_jax.graph.tracing import trace
from bcdl_jax.priors.posterior import Posterior
from bcdl_jax.train import trainer, validation, while_shrinking
from bcdl_jax.train.validation import shrink_measure
from bcdl_jax.train.while_shrinking import mask_further
from tests.conftest import CHAIN, CONV_CHAIN, SmallConvNet, SmallNet, assert_trees_close, make_posterior
from tests.train.helpers import BATCH, EXAMPLES, copy, setup
from tests.train.helpers import nll as dense_nll
from tests.train.test_ensemble import train

OPTIMIZER = optax.chain(optax.adam(optax.cosine_decay_schedule(0.01, 40)), bcdl_jax.train.params_ema(0.9))


def conv_nll(params, batch, key):
    logits = SmallConvNet().apply({"params": params}, batch[0], deterministic=False, rngs={"noise": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def make_step(nll):
    return bcdl_jax.train.make_train_step(nll, OPTIMIZER, num_examples=EXAMPLES, kl_weight=bcdl_jax.kl_warmup(30))


def with_dead_groups(params, dead):
    """The params with noisy scales for the given groups, a dictionary {layer: [groups]}."""

    def kill(name, layer):
        groups = jnp.asarray(dead.get(name, []), int)
        return layer.replace(
            scale_mean=layer.scale_mean.at[groups].set(1e-3),
            scale_log_variance=layer.scale_log_variance.at[groups].set(-2),
        )

    return map_named_layers(kill, params, Posterior)


def conv_state():
    images = jax.random.normal(jax.random.key(1), (EXAMPLES, 8, 8, 2))
    labels = jnp.argmax(images.mean((1, 2, 3))[:, None] * jnp.array([-1, 0.01, 1]), -1)
    params = jax.jit(SmallConvNet().init)(jax.random.key(0), images[:1])["params"]
    params = with_dead_groups(params, {"Conv_0": [0, 3], "Conv_1": [1, 2, 5]})
    return bcdl_jax.train.create_train_state(params, OPTIMIZER, jax.random.key(2)), (images, labels)


def assert_same_where_kept(small, whole, params):
    """Two full-size states agree on all kept groups."""
    for tree in (lambda state: state.params, lambda state: bcdl_jax.train.averaged_params(state.optimizer_state)):
        for name, layer in bcdl_jax.variational_layers(params).items():
            one, other = (bcdl_jax.variational_layers(tree(state))[name] for state in (small, whole))
            for ours, theirs in zip(one.kernel_moments(), other.kernel_moments(), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
            for field in ("scale_mean", "scale_log_variance"):
                kept = np.asarray(layer.group_mask) > 0
                np.testing.assert_allclose(getattr(one, field)[kept], getattr(other, field)[kept], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("multiple_of", [1, 2])
def test_a_shrunk_step_equals_the_masked_step(multiple_of):
    state, conv_data = conv_state()
    state = bcdl_jax.train.prune_state(state, 3.0, CONV_CHAIN).replace(step=jnp.int32(5))
    shrinking = bcdl_jax.train.ShrinkingConfig(conv_nll, make_step, 3.0, CONV_CHAIN, multiple_of=multiple_of)
    batch = jax.tree.map(lambda array: array[:BATCH], conv_data)
    small = bcdl_jax.train.leave_out_pruned(shrinking, state, batch)
    shapes = [layer.kernel_shape for layer in bcdl_jax.variational_layers(small.state.params).values()]
    assert shapes[0] == (3, 3, 2, 2)
    assert shapes[1] == (3, 3, 2, 3 if multiple_of == 1 else 4)
    before, after = small.report.multiply_adds
    assert f"Conv_0 3 x 3 x 2 x 2, Conv_1 {' x '.join(map(str, shapes[1]))}" in str(small)
    assert f"multiply-adds {before:,} -> {after:,}" in str(small)
    assert_trees_close(small.expand(small.state), state, rtol=0)

    whole_step, small_step = jax.jit(make_step(conv_nll)), jax.jit(small.step)
    whole, shrunk = state, small.state
    for start in range(0, 5 * BATCH, BATCH):
        batch = jax.tree.map(lambda array, start=start: array[start : start + BATCH], conv_data)
        whole, whole_metrics = whole_step(whole, batch)
        shrunk, metrics = small_step(shrunk, batch)
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
            {name: float(value) for name, value in whole_metrics.items()}, rel=1e-5
        )
    expanded = small.expand(shrunk)
    assert jax.tree.map(jnp.shape, expanded) == jax.tree.map(jnp.shape, state)
    assert int(expanded.step) == 10
    assert_same_where_kept(expanded, whole, state.params)
    # The small network was trained.
    assert (
        float(
            jnp.abs(
                expanded.params["Conv_1"]["posterior"].kernel_mean - state.params["Conv_1"]["posterior"].kernel_mean
            ).max()
        )
        > 0.01
    )
    # The pruned groups keep their values.
    gone = expanded.params["Conv_0"]["posterior"].kernel_mean[..., 0]
    np.testing.assert_array_equal(gone, state.params["Conv_0"]["posterior"].kernel_mean[..., 0])


@pytest.mark.slow
def test_a_measure_without_the_pruned_groups_stays_right_during_training():
    def error(params, held_out):
        logits = SmallConvNet().apply({"params": params}, held_out[0])
        return 100 * jnp.mean(jnp.argmax(logits, -1) != held_out[1])

    def cross_entropy(params, held_out):
        logits = SmallConvNet().apply({"params": params}, held_out[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, held_out[1]).mean()

    state, conv_data = conv_state()
    state = bcdl_jax.train.prune_state(state, 3.0, CONV_CHAIN)
    small = {measure: shrink_measure(measure, state.params, conv_data) for measure in (error, cross_entropy)}
    step = jax.jit(make_step(conv_nll))
    for start in range(0, 5 * BATCH, BATCH):
        for measure, shrunk in small.items():
            expected = float(measure(state.params, conv_data))
            assert float(shrunk(state.params, conv_data)) == pytest.approx(expected, rel=1e-5)
        state, _ = step(state, jax.tree.map(lambda array, start=start: array[start : start + BATCH], conv_data))
    # The first convolution has two of its four channels.
    program = str(jax.make_jaxpr(lambda held_out: small[error](state.params, held_out))(conv_data))
    assert "f32[3,3,2,2]" in program


@pytest.mark.slow
def test_a_measure_that_is_not_one_of_examples_computes_the_full_size():
    state, conv_data = conv_state()
    state = bcdl_jax.train.prune_state(state, 3.0, CONV_CHAIN)
    weighted = (*conv_data, jnp.float32(2))
    assert (
        float(shrink_measure(lambda params, held_out: held_out[2] * 1.5, state.params, weighted)(None, weighted)) == 3
    )


@pytest.mark.slow
def test_it_shrinks_only_where_that_pays():
    state, conv_data = conv_state()
    batch = jax.tree.map(lambda array: array[:BATCH], conv_data)
    shrinking = bcdl_jax.train.ShrinkingConfig(conv_nll, make_step, 3.0, CONV_CHAIN, multiple_of=1)
    small = bcdl_jax.train.prune_and_shrink(shrinking, state, batch)
    before, after = small.report.multiply_adds
    assert after < 0.5 * before
    assert (
        bcdl_jax.train.prune_and_shrink(shrinking, small.whole, batch, small) is None
    )  # No further group can be pruned.
    wanting = bcdl_jax.train.ShrinkingConfig(conv_nll, make_step, 3.0, CONV_CHAIN, multiple_of=1, least_saving=0.9)
    assert bcdl_jax.train.prune_and_shrink(wanting, state, batch) is None
    safe = bcdl_jax.train.ShrinkingConfig(conv_nll, make_step, 30.0, CONV_CHAIN)
    assert bcdl_jax.train.prune_and_shrink(safe, state, batch) is None
    assert bcdl_jax.train.leave_out_pruned(shrinking, state, batch) is None  # Nothing is masked.
    empty = state.replace(params=bcdl_jax.prune(state.params, -1e9, CONV_CHAIN))
    assert bcdl_jax.train.leave_out_pruned(shrinking, empty, batch) is None


def test_multiply_adds_are_counted_by_layer():
    state, (images, labels) = conv_state()
    program = trace(conv_nll, state.params, (images[:BATCH], labels[:BATCH]), state.key)
    nodes = jax.tree.leaves(state.params, is_leaf=bcdl_jax.compression.is_layer)
    owners = [number for number, node in enumerate(nodes) for _ in jax.tree.leaves(node)]
    owners += [None] * (len(program.inputs) - len(owners))
    found = multiply_adds_by_owner(program, owners)
    assert found.pop(None) == 0
    assert sum(found.values()) == multiply_adds(program)
    # One product for the means and one for the variances, at 8 x 8 positions, then at 2 x 2 after the pooling and without padding.
    for number, (layer, positions) in enumerate(zip(nodes, (64, 4, 1), strict=True)):
        assert found[number] == 2 * BATCH * positions * np.prod(layer.kernel_shape)


@pytest.mark.slow
def test_a_shrinking_that_would_not_pay_is_not_tried(monkeypatch):
    """Only a layer with few of the multiply-adds loses many groups."""
    state, conv_data = conv_state()
    state = bcdl_jax.train.prune_state(state, 3.0, CONV_CHAIN)
    last = list(bcdl_jax.variational_layers(state.params))[-1]
    groups = bcdl_jax.variational_layers(state.params)[last].scale_mean.size
    params = with_dead_groups(state.params, {last: range(groups - groups // 3, groups)})
    batch = jax.tree.map(lambda array: array[:BATCH], conv_data)
    shrinking = bcdl_jax.train.ShrinkingConfig(conv_nll, make_step, 3.0, CONV_CHAIN, multiple_of=1)
    tried = []
    monkeypatch.setattr(while_shrinking, "leave_out_pruned", lambda *_: tried.append(1))
    assert bcdl_jax.train.prune_and_shrink(shrinking, state.replace(params=params), batch) is None
    assert not tried
    fresh, _ = conv_state()
    bcdl_jax.train.prune_and_shrink(shrinking, fresh, batch)
    assert tried


@pytest.mark.slow
def test_a_network_with_a_layer_of_which_shrink_left_nothing_shrinks_further(data):
    """The layer is not in the way of the others."""
    params = jax.jit(SmallNet().init)(jax.random.key(0), jnp.ones((1, 6)))["params"]
    params = with_dead_groups(params, {"Dense_0": [0, 3], "Dense_1": [1, 2]})
    params["gone"] = {"posterior": make_posterior(jax.random.key(0), (0, 0), "input")}
    state = bcdl_jax.train.create_train_state(params, OPTIMIZER, jax.random.key(2))
    shrinking = bcdl_jax.train.ShrinkingConfig(dense_nll, make_step, 3.0, CHAIN, multiple_of=1)
    batch = jax.tree.map(lambda array: array[:BATCH], data)
    small = bcdl_jax.train.prune_and_shrink(shrinking, state, batch)
    assert str(small).startswith("training continues with Dense_0 4 x 3, Dense_1 3 x 4, Dense_2 4 x 3")
    small_state, metrics = jax.jit(small.step)(small.state, batch)
    assert jnp.isfinite(metrics["loss"])
    assert small.expand(small_state).params["gone"]["posterior"].kernel_shape == (0, 0)
    nothing = bcdl_jax.train.create_train_state({"gone": params["gone"]}, OPTIMIZER, jax.random.key(2))
    shrinking = bcdl_jax.train.ShrinkingConfig(dense_nll, make_step, 3.0)
    assert bcdl_jax.train.prune_and_shrink(shrinking, nothing, batch) is None


def test_pruning_checks_become_rarer():
    for first, expected in ((1, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]), (3, [3, 6, 9, 12, 18, 24, 36])):
        shrinking = bcdl_jax.train.ShrinkingConfig(dense_nll, make_step, 3.0, first_check=first)
        assert [epochs for epochs in range(40) if shrinking.is_due(epochs)] == expected
    often = bcdl_jax.train.ShrinkingConfig(dense_nll, make_step, 3.0, first_check=3, regular_checks=True)
    assert [epochs for epochs in range(13) if often.is_due(epochs)] == [3, 6, 9, 12]
    assert not often.is_settled(1000)


@pytest.mark.slow
def test_thresholds_may_be_a_function_of_the_params():
    state, conv_data = conv_state()
    batch = jax.tree.map(lambda array: array[:BATCH], conv_data)
    asked = []

    def thresholds(params):
        asked.append(params)
        return 3.0

    found = [
        bcdl_jax.train.prune_and_shrink(
            bcdl_jax.train.ShrinkingConfig(conv_nll, make_step, each, CONV_CHAIN, multiple_of=1), state, batch
        ).report
        for each in (3.0, thresholds)
    ]
    assert asked == [state.params]
    for one, other in zip(*(report.leaves for report in found), strict=True):
        assert one.after == other.after


@pytest.mark.slow
def test_groups_may_be_pruned_by_another_score():
    state, conv_data = conv_state()
    layer = state.params["Conv_1"]["posterior"]
    noisy = layer.replace(kernel_log_variance=layer.kernel_log_variance.at[..., 4].set(9.0))
    state = state.replace(params=state.params | {"Conv_1": {"posterior": noisy}})
    batch = jax.tree.map(lambda array: array[:BATCH], conv_data)
    shrunk = [
        bcdl_jax.train.prune_and_shrink(
            bcdl_jax.train.ShrinkingConfig(conv_nll, make_step, 3.0, CONV_CHAIN, multiple_of=1, score=score),
            state,
            batch,
        )
        for score in (bcdl_jax.compression.log_dropout_rate, bcdl_jax.compression.log_noise_to_signal)
    ]
    masks = [small.whole.params["Conv_1"]["posterior"].output_mask for small in shrunk]
    assert masks[0][4] == 1
    assert masks[1][4] == 0


def shrinking_ensemble(data, stop=None, states=None, first_check=2, epochs=5, **options):
    """Trains two seeds. Groups of the first one can be pruned, and pruning checks follow after the second and the fourth epoch."""
    _, _, fresh = setup(OPTIMIZER, seeds=(3, 4))
    if states is None:
        params = with_dead_groups(bcdl_jax.train.select_seed(fresh, 0).params, {"Dense_1": [0, 1], "Dense_2": [2, 3]})
        states = fresh.replace(params=bcdl_jax.train.stack_seeds([params, bcdl_jax.train.select_seed(fresh, 1).params]))
    shrinking = bcdl_jax.train.ShrinkingConfig(
        dense_nll, make_step, 3.0, CHAIN, first_check=first_check, multiple_of=1, **options
    )
    return train(
        states, data, make_step(dense_nll), (3, 4), epochs=epochs, in_turn=True, shrinking=shrinking, stop=stop
    )


@pytest.mark.slow
def test_an_ensemble_shrinks_seed_by_seed_and_resumes_bit_by_bit(data, monkeypatch):
    expected, reports, _ = shrinking_ensemble(data)
    (message,) = [message for report in reports for message in report.shrink_messages]
    assert message.startswith(
        "Seed 3, epoch 2: training continues with Dense_0 6 x 3, Dense_1 3 x 2, Dense_2 2 x 3; multiply-adds "
    )
    masks = expected.params["Dense_1"]["posterior"].input_mask
    assert masks.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert reports[-1].reports[0].kept["Dense_1"] <= 3

    monkeypatch.setattr(trainer, "_CHUNK_SECONDS", 0.0)
    states, resumed, ended, ends = None, [], True, 0
    while ended:
        stop = functools.partial(next, iter([False] * 17), True)
        states, new, ended = shrinking_ensemble(data, stop, None if states is None else copy(states))
        resumed, ends = resumed + new, ends + ended
    assert ends == 2
    assert_trees_close(states, expected, rtol=0)
    assert [report.reports for report in resumed] == [report.reports for report in reports]


@pytest.mark.slow
def test_groups_can_be_masked_without_being_left_out(data, monkeypatch):
    smaller, small_reports, _ = shrinking_ensemble(data)
    expected, reports, _ = shrinking_ensemble(data, remove_masked=False)
    assert not any(report.shrink_messages for report in reports)
    assert expected.params["Dense_1"]["posterior"].input_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert [report.reports[0].kept for report in reports] == [report.reports[0].kept for report in small_reports]
    kernels, small_kernels = (
        {
            name: layer.kernel_moments()[0]
            for name, layer in bcdl_jax.variational_layers(bcdl_jax.train.select_seed(params, 0)).items()
        }
        for params in (expected.params, smaller.params)
    )
    assert_trees_close(kernels, small_kernels, rtol=1e-5)  # Masked weights count as zero.

    monkeypatch.setattr(trainer, "_CHUNK_SECONDS", 0.0)
    stop = functools.partial(next, iter([False] * 29), True)
    states, _, ended = shrinking_ensemble(data, stop, remove_masked=False)
    assert ended
    resumed, _, _ = shrinking_ensemble(data, None, copy(states), remove_masked=False)
    assert_trees_close(resumed, expected, rtol=0)


@pytest.mark.slow
def test_nothing_is_masked_that_would_leave_a_layer_empty(data):
    states, _, _ = shrinking_ensemble(data, remove_masked=False, epochs=1)
    state = bcdl_jax.train.select_seed(states, 0)
    everything = bcdl_jax.train.ShrinkingConfig(dense_nll, make_step, -100.0, CHAIN, remove_masked=False)
    assert mask_further(everything, state) is state


@pytest.mark.slow
def test_the_reported_error_is_that_of_the_whole_network(data, monkeypatch):
    made = []

    def spy(*arguments):
        made.append(shrink_measure(*arguments))
        return made[-1]

    reports = []
    for measure in (spy, lambda measure, *_: jax.jit(measure)):
        monkeypatch.setattr(validation, "shrink_measure", measure)
        reports.append([report.reports for report in shrinking_ensemble(data, first_check=1, epochs=7)[1]])
    assert len(made) == 1  # Once, for the seed that has shrunk.
    assert reports[0] == reports[1]


def test_bad_arguments(data):
    for name, value in (("first_check", 0), ("multiple_of", 0), ("least_saving", 1.0)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least"):
            bcdl_jax.train.ShrinkingConfig(dense_nll, make_step, 3.0, **{name: value})
    step, _, states = setup(OPTIMIZER)
    shrinking = bcdl_jax.train.ShrinkingConfig(dense_nll, make_step, 3.0)
    with pytest.raises(ValueError, match="in_turn is False; it must be True with shrinking"):
        train(states, data, step, (0, 1, 2), shrinking=shrinking)
