"""The prefix store over the scripted model: what is held, saved, pinned and evicted, in exact numbers."""

import threading
from itertools import chain, permutations

import numpy as np
import pytest

from keepwarm.core.prompt import Prompt
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.selftest import layout_of
from keepwarm.engine.store import NoRoom, PrefixStore, slot_bytes
from keepwarm.engine.tiers import HostTier
from tests.cold import evaluate, values
from tests.unit.engine.conftest import tokens


def prompt(n, *, seed=0, tenant="a", marks=()):
    return Prompt(tenant, tokens(n, seed), tuple(marks))


def joined(*parts, tenant="a", marks=()):
    return Prompt(tenant, np.concatenate(parts), tuple(marks))


class Shelf:
    """A model, a store of `blocks` blocks, and the two steps every test takes."""

    def __init__(self, blocks=100, g=1, n_ctx=2048):
        self.model = ScriptedModel(n_streams=3, n_ctx=n_ctx, granularity=g)
        self.layout = layout_of(self.model)
        self.slot = slot_bytes(self.layout)
        self.tier = HostTier(blocks * self.slot, self.slot)
        self.store = self.opened("model")

    def opened(self, *identity):
        g, n_ctx = self.model.granularity, self.model.n_ctx
        return PrefixStore(self.layout, self.tier, identity=identity, granularity=g, n_ctx=n_ctx)

    def save(self, prompt, *, n=None, spend=False, pin=None):
        """Evaluate and store; how many tokens were added."""
        n_evaluated = evaluate(self.model, prompt, n_tokens=n)
        added = self.store.save(prompt, n_evaluated, self.model, 0, spend=spend, pin=pin)
        self.store.check_integrity()
        return added

    def found(self, prompt, *, want_logits=True):
        held = self.store.hold(prompt, want_logits=want_logits)
        self.store.release(held)
        return held.n_tokens

    @property
    def blocks(self):
        """(free, resident, pinned) in blocks; their sum is the budget."""
        store = self.store
        assert self.tier.n_free * self.slot + store.bytes_resident + store.bytes_pinned == store.bytes_total
        return self.tier.n_free, store.bytes_resident // self.slot, store.bytes_pinned // self.slot


@pytest.fixture
def shelf():
    return Shelf()


# --- hold, release, restore


def test_an_empty_store_holds_nothing(shelf):
    held = shelf.store.hold(prompt(100), want_logits=True)
    assert (held.n_tokens, held.nodes) == (0, ())
    shelf.store.release(held)


def test_all_but_two_tokens_are_found_where_logits_are_wanted(shelf):
    assert shelf.save(prompt(200)) == 200
    assert shelf.blocks == (96, 4, 0)
    assert shelf.found(prompt(200)) == 198
    assert shelf.found(prompt(200), want_logits=False) == 200


@pytest.mark.parametrize("g, expected", [(1, 130), (8, 128), (64, 128)])
def test_a_shared_beginning_is_found_at_the_granularity(g, expected):
    shelf = Shelf(g=g)
    shelf.save(prompt(200))
    assert shelf.found(joined(tokens(130), tokens(70, seed=5))) == expected


@pytest.mark.parametrize("g", [1, 8, 64])
def test_a_restored_stream_has_the_cold_cells_and_goes_on_like_it(g):
    shelf = Shelf(g=g)
    ours = joined(tokens(150), tokens(80, seed=1), marks=[150])
    evaluate(shelf.model, ours, stream=1)
    cold = values(shelf.model, 1)
    shelf.save(joined(tokens(150), tokens(90, seed=2), marks=[150]))
    held = shelf.store.hold(ours, want_logits=True)
    assert held.n_tokens == 150
    shelf.store.restore(held, shelf.model, 2)
    shelf.store.release(held)
    assert np.array_equal(values(shelf.model, 2), cold[:150])
    shelf.model.evaluate(2, ours.tokens[150:], 150, want_logits=False)
    assert np.array_equal(values(shelf.model, 2), cold)


def test_a_hollow_block_that_goes_while_room_is_made_for_it_is_added_anew():
    shelf = Shelf(blocks=2)
    shelf.save(prompt(128))
    index = shelf.store._index
    (first,) = (node for node in index.nodes() if node.start == 0)
    index.stored(first, 100)
    shelf.tier.free(index.evict_host().slot)
    index.leave_disk(first)  # damaged: hollow now, held by the block behind it
    shelf.save(prompt(64, seed=1))
    other = shelf.store.hold(prompt(64, seed=1), want_logits=False)
    assert shelf.save(prompt(64)) == 64  # the only victim is the block behind the hollow one
    shelf.store.release(other)
    assert (shelf.found(prompt(128), want_logits=False), shelf.blocks) == (64, (0, 2, 0))


def test_a_context_asked_about_again_is_not_put_together_again(shelf):
    context = tokens(192)
    shelf.save(prompt(192))
    cold = values(shelf.model)
    for seed in (1, 2):
        held = shelf.store.hold(joined(context, tokens(9, seed=seed)), want_logits=True)
        shelf.store.restore(held, shelf.model, 1)
        assert np.array_equal(values(shelf.model, 1), cold)
        for node in held.nodes:
            shelf.tier.bytes_of(node.slot)[:] = 0  # the second time they are not looked at
        shelf.store.release(held)


@pytest.mark.parametrize("g", [1, 8, 64])
def test_restores_in_any_order_are_right(g):
    shelf = Shelf(g=g)
    base = tokens(200)
    prompts = [
        joined(base, tokens(60, seed=1)),
        joined(base[:100], tokens(60, seed=2)),
        joined(base[:128], tokens(60, seed=3), marks=[70]),
        joined(base[:70], tokens(60, seed=4), marks=[70]),
        joined(base, tokens(60, seed=1), tenant="b"),
        joined(base[:129], tokens(60, seed=2), tenant="b"),
        joined(tokens(64, seed=8), base[:70]),
        joined(tokens(64, seed=9), base[:70]),  # the same block, not after the same
    ]
    for one in prompts:
        shelf.save(one)
    asked = [
        *prompts,
        joined(base[:160], tokens(9, seed=7)),  # less of what was assembled before
        joined(base[:70], tokens(9, seed=7), marks=[70]),  # the same tokens, but cut there
        joined(base[:77], tokens(9, seed=7)),
        joined(base[:140], tokens(9, seed=7), tenant="b"),
    ]
    cold = []
    for one in asked:
        evaluate(shelf.model, one)
        cold.append(values(shelf.model))
    for i in chain.from_iterable(permutations(range(len(asked)), 2)):  # each after each other
        held = shelf.store.hold(asked[i], want_logits=True)
        assert held.n_tokens
        shelf.store.restore(held, shelf.model, 1)
        shelf.store.release(held)
        assert np.array_equal(values(shelf.model, 1), cold[i][: held.n_tokens])


def test_another_tenant_finds_nothing(shelf):
    shelf.save(prompt(200))
    assert shelf.found(prompt(200, tenant="b")) == 0
    assert shelf.save(prompt(200, tenant="b")) == 200  # kept for itself, shared with nobody


def test_another_identity_finds_nothing(shelf):
    shelf.save(prompt(200))
    shelf.store = shelf.opened("model", "other template")
    assert shelf.found(prompt(200)) == 0


# --- save


def test_only_what_is_new_is_added(shelf):
    assert shelf.save(prompt(200)) == 200
    assert shelf.save(prompt(200)) == 0
    longer = joined(tokens(200), tokens(100, seed=1))
    assert shelf.store.n_missing(longer, 300) == 300 - 192
    assert shelf.save(longer) == 300 - 192  # from the last whole block on
    assert shelf.blocks == (95, 5, 0)  # the short block of 8 tokens gave way to a full one
    assert shelf.store.n_missing(longer, 300) == 0
    assert shelf.found(longer) == 298


def test_an_open_remainder_is_not_stored():
    shelf = Shelf(g=8)
    assert shelf.save(prompt(70)) == 64
    assert shelf.save(prompt(71, marks=[71])) == 7  # closed by its mark


def test_a_spent_stream_keeps_only_what_was_saved_and_stores_the_same(shelf):
    first, second = prompt(128), joined(tokens(128), tokens(80, seed=1))
    shelf.save(first)
    evaluate(shelf.model, second)
    cold = values(shelf.model)
    assert shelf.store.save(second, 200, shelf.model, 0, spend=True, pin=None) == 72
    assert np.array_equal(values(shelf.model), cold[128:200])
    held = shelf.store.hold(second, want_logits=False)
    assert held.n_tokens == 200
    shelf.store.restore(held, shelf.model, 1)
    shelf.store.release(held)
    assert np.array_equal(values(shelf.model, 1), cold[:200])


def test_what_finds_no_room_is_not_stored():
    shelf = Shelf(blocks=3)
    assert shelf.save(prompt(300)) == 192
    assert shelf.blocks == (0, 3, 0)
    assert shelf.found(prompt(300)) == 192


def test_a_budget_of_no_block_stores_nothing():
    shelf = Shelf(blocks=0)
    assert shelf.save(prompt(300)) == 0
    assert shelf.found(prompt(300)) == 0
    with pytest.raises(NoRoom):
        shelf.save(prompt(300), pin="object")


# --- eviction


def test_old_blocks_make_room_but_never_locked_ones():
    shelf = Shelf(blocks=6)
    shelf.save(prompt(192))
    cold = values(shelf.model)
    held = shelf.store.hold(prompt(192), want_logits=False)
    for seed in range(1, 8):
        assert shelf.save(prompt(320, seed=seed)) == 192  # three slots are left for it
    shelf.store.restore(held, shelf.model, 1)
    assert np.array_equal(values(shelf.model, 1), cold)
    shelf.store.release(held)
    shelf.save(prompt(384, seed=50))
    assert shelf.found(prompt(192)) == 0
    assert shelf.blocks == (0, 6, 0)


def test_eviction_never_takes_pinned_blocks():
    shelf = Shelf(blocks=6)
    shelf.save(prompt(128), pin="object")
    for seed in range(1, 8):
        assert shelf.save(prompt(384, seed=seed)) == 256
    assert shelf.blocks == (0, 4, 2)
    assert shelf.found(prompt(128), want_logits=False) == 128


# --- pins


def test_pinned_blocks_are_counted_once_and_come_back_to_eviction(shelf):
    shelf.save(prompt(150), pin="object")
    assert shelf.blocks == (97, 0, 3)
    shelf.save(prompt(64, seed=1))
    assert shelf.blocks == (96, 1, 3)
    shelf.store.unpin("object")
    assert shelf.blocks == (96, 4, 0)
    shelf.store.unpin("object")
    shelf.store.unpin("never heard of")
    assert shelf.blocks == (96, 4, 0)


def test_what_is_stored_already_is_pinned_without_a_stream(shelf):
    shelf.save(prompt(128))
    for stream in range(3):
        shelf.model.forget(stream, 0, -1)
    assert shelf.store.save(prompt(128), 128, shelf.model, 0, spend=True, pin="object") == 0
    assert shelf.blocks == (98, 0, 2)


def test_two_objects_share_their_common_blocks(shelf):
    shelf.save(joined(tokens(128), tokens(64, seed=1)), pin="one")
    shelf.save(joined(tokens(128), tokens(64, seed=2)), pin="two")
    assert shelf.blocks == (96, 0, 4)
    shelf.store.unpin("one")
    assert shelf.blocks == (96, 1, 3)
    assert shelf.found(joined(tokens(128), tokens(64, seed=2)), want_logits=False) == 192
    shelf.store.unpin("two")
    assert shelf.blocks == (96, 4, 0)


def test_a_pin_used_again_moves(shelf):
    shelf.save(prompt(128), pin="object")
    shelf.save(prompt(64, seed=1), pin="object")
    assert shelf.blocks == (97, 2, 1)
    shelf.store.unpin("object")
    assert shelf.blocks == (97, 3, 0)


def test_a_pin_takes_the_room_of_what_nobody_holds():
    shelf = Shelf(blocks=4)
    shelf.save(prompt(256))
    assert shelf.save(prompt(256, seed=1), pin="object") == 256
    assert shelf.blocks == (0, 0, 4)


def test_no_room_says_how_much_is_needed_and_how_much_can_be_freed():
    shelf = Shelf(blocks=10)
    shelf.save(prompt(6 * 64), pin="one")
    shelf.save(prompt(3 * 64, seed=1))
    with pytest.raises(NoRoom) as caught:
        shelf.save(prompt(5 * 64 - 1, seed=2), pin="two")
    assert caught.value.n_bytes_needed == 5 * shelf.slot
    assert caught.value.n_bytes_free == 4 * shelf.slot
    assert f"needs {5 * shelf.slot:,} bytes, {4 * shelf.slot:,} can be freed" in str(caught.value)
    assert shelf.blocks == (1, 3, 6)  # nothing was evicted for it


def test_no_room_counts_what_the_object_has_already():
    shelf = Shelf(blocks=5)
    shelf.save(prompt(3 * 64))
    with pytest.raises(NoRoom) as caught:  # three blocks are there, three more are needed, two are free
        shelf.save(joined(tokens(3 * 64), tokens(3 * 64, seed=1)), pin="object")
    assert (caught.value.n_bytes_needed, caught.value.n_bytes_free) == (3 * shelf.slot, 2 * shelf.slot)


def test_a_pin_that_found_no_room_leaves_nothing_locked():
    shelf = Shelf(blocks=4)
    shelf.save(prompt(128))
    with pytest.raises(NoRoom):
        shelf.save(joined(tokens(128), tokens(256, seed=1)), pin="object")
    assert shelf.blocks == (2, 2, 0)
    assert shelf.save(prompt(256, seed=2)) == 256  # every block could be had


def test_a_pin_that_found_no_room_keeps_its_former_prefix():
    shelf = Shelf(blocks=4)
    shelf.save(prompt(128), pin="object")
    with pytest.raises(NoRoom):
        shelf.save(prompt(256, seed=1), pin="object")
    assert shelf.blocks == (2, 0, 2)


# --- threads


def test_leases_come_and_go_while_the_compute_thread_saves():
    shelf = Shelf(blocks=12)
    prompts = [prompt(200, seed=seed) for seed in range(4)]
    cold = []
    for one in prompts:
        evaluate(shelf.model, one)
        cold.append(values(shelf.model))
    stop, faults = threading.Event(), []

    def lease():
        while not stop.is_set():
            for one in prompts:
                held = shelf.store.hold(one, want_logits=True)
                shelf.store.release(held)
                if held.n_tokens > 198:
                    faults.append(held.n_tokens)

    reader = threading.Thread(target=lease)
    reader.start()
    try:
        for i in range(60):
            shelf.save(prompts[i % 4])
            held = shelf.store.hold(prompts[i % 4], want_logits=True)
            shelf.store.restore(held, shelf.model, 1)
            shelf.store.release(held)
            assert np.array_equal(values(shelf.model, 1), cold[i % 4][: held.n_tokens])
    finally:
        stop.set()
        reader.join()
    assert not faults
    shelf.store.check_integrity()
