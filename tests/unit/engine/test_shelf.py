"""Which blocks may leave a tier: what the policy hears of it, and the set it is shown."""

from keepwarm.engine.shelf import Shelf


class Recorded:
    """A policy that notes what it is told, and gives up the largest id."""

    name = "recorded"

    def __init__(self):
        self.told = []

    def __len__(self):
        return 0

    def stored(self, block, facts, now_s): ...

    def hit(self, blocks, now_s): ...

    def offer(self, block):
        self.told.append(("offer", block))

    def forget(self, block):
        self.told.append(("forget", block))

    def victim(self, evictable, now_s):
        return max(evictable, default=None)


def test_a_block_is_offered_once_each_time_it_becomes_free():
    shelf = Shelf(Recorded())
    for may_leave in (False, True, True, False, True):
        shelf.refresh(7, may_leave)
    assert shelf.policy.told == [("offer", 7), ("offer", 7)]


def test_a_block_that_left_is_forgotten_and_may_not_leave_again():
    shelf = Shelf(Recorded())
    shelf.refresh(3, True)
    shelf.forget(3)
    shelf.forget(900)  # one that never could
    assert shelf.policy.told == [("offer", 3), ("forget", 3), ("forget", 900)]
    assert shelf.victim(0.0) is None


def test_what_may_leave_is_a_set_of_ids():
    shelf, twin = Shelf(Recorded()), set()
    for id_ in (5, 0, 300, 5, 9):
        shelf.refresh(id_, True)
        twin.add(id_)
    for id_ in (0, 4):
        shelf.refresh(id_, False)
        twin.discard(id_)
    assert shelf.evictable == twin and len(shelf.evictable) == len(twin) and list(shelf.evictable) == sorted(twin)
    assert [id_ in shelf.evictable for id_ in (5, 0, 300, 301, 10**6, -1, "5")] == [True, False, True, *[False] * 4]
    assert shelf.victim(0.0) == 300
    assert not Shelf(Recorded()).evictable
