import gc

from experiments.runtime import memory


def test_garbage_is_collected_as_before_afterwards():
    before = gc.get_threshold()
    with memory.rare_garbage_collection():
        assert gc.get_threshold() == (100 * before[0], *before[1:])
    assert gc.get_threshold() == before
