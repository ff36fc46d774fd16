"""How much RAM the host tier may take now, and the account of the three byte budgets. Pure: readings in, bytes out.

The tier is made smaller before the machine has to swap, and grows back slowly once it has been calm for a while:

- *pressed*: tasks wait for memory, or less than a reserve is left (of the machine, or of the control group's limit). The
  tier gives back a quarter of what it takes up, or all that is lacking when that is more, down to a floor; when next to
  nothing is left, down to nothing. What is lacking is given at once; for waiting alone some readings pass before the next
  step, since the kernel's average of 10 s tells of a moment long gone.
- *calm*: hardly anyone waits, and growing by a step would still leave one and a half reserves when the tier has filled
  all it may. After enough calm readings in a row it grows by an eighth of its configured size per reading.
- between the two nothing changes, so a reading that stays the same moves the target one way or not at all.

Swap in use is not judged: kernels swap idle pages out with memory to spare. Unknown numbers press nobody.
`0 <= bytes_target <= configured_bytes`, and a worse reading never gives a larger target.
"""

from msgspec import Struct

from keepwarm.engine import PoolStatus
from keepwarm.engine.pressure import MemoryReading

MIB = 1 << 20


class GovernorSettings(Struct, frozen=True):
    """Thresholds. The counts of readings are meant for one a second."""

    waiting_percent_max: float = 10.0  # some_avg10 above this presses
    waiting_percent_calm: float = 1.0  # and up to this is calm
    stalled_percent_critical: float = 10.0  # full_avg10 above this: nothing runs for want of memory
    reserve_bytes_min: int = 512 * MIB
    reserve_share: float = 0.05  # of the limit, or of the machine's RAM, if that is more
    critical_share: float = 0.25  # of the reserve: with less left, the floor no longer counts
    floor_bytes: int = 64 * MIB  # below this the tier is of no use
    give_share: float = 0.25  # of what the tier takes up
    grow_share: float = 0.125  # of its configured size
    calm_share: float = 1.5  # reserves that must be left after growing; above 1, so that growing never presses
    n_calm_min: int = 30  # readings in a row
    n_settling: int = 5  # readings after a step in which waiting alone makes no other


class Governed(Struct, frozen=True):
    """What was decided last. `n_calm`: calm readings in a row; `n_settling`: readings until waiting alone counts again."""

    bytes_target: int
    n_calm: int = 0
    n_settling: int = 0


DEFAULTS = GovernorSettings()


def govern(
    configured_bytes: int,
    before: Governed,
    reading: MemoryReading,
    settings: GovernorSettings = DEFAULTS,
    *,
    taken_bytes: int | None = None,
) -> Governed:
    """The host tier's next size. It takes up `taken_bytes` of RAM now (None: all it may).

    The first time, `before` is `Governed(configured_bytes)`.
    """
    target = min(before.bytes_target, configured_bytes)
    n_settling = max(before.n_settling - 1, 0)
    wanted = host_target(configured_bytes, target, reading, settings, taken_bytes=taken_bytes)
    if wanted < target:
        if before.n_settling and not lacking_bytes(reading, settings):
            return Governed(target, 0, n_settling)
        return Governed(wanted, 0, settings.n_settling)
    if wanted == target:
        return Governed(target, 0, n_settling)
    n_calm = min(before.n_calm + 1, settings.n_calm_min)
    return Governed(wanted if n_calm >= settings.n_calm_min else target, n_calm, n_settling)


def host_target(
    configured_bytes: int,
    current_bytes: int,
    reading: MemoryReading,
    settings: GovernorSettings = DEFAULTS,
    *,
    taken_bytes: int | None = None,
) -> int:
    """One step from the size of `current_bytes` as this reading alone would have it: smaller, the same, or larger."""
    current = min(current_bytes, configured_bytes)
    taken = current if taken_bytes is None else min(taken_bytes, current)
    lacking = lacking_bytes(reading, settings)
    if lacking or _above(reading.some_avg10, settings.waiting_percent_max):
        floor = 0 if _critical(reading, settings) else settings.floor_bytes
        give = max(lacking, int(taken * settings.give_share), 1)
        return min(current, max(taken - give, floor))
    step = min(max(int(configured_bytes * settings.grow_share), 1), configured_bytes - current)
    spare = _spare_bytes(reading, settings)
    unfilled = current - taken  # granted already, so not to be granted twice
    if _above(reading.some_avg10, settings.waiting_percent_calm) or (spare is not None and spare < unfilled + step):
        return current
    return current + step


def lacking_bytes(reading: MemoryReading, settings: GovernorSettings = DEFAULTS) -> int:
    """Bytes by which the reserve is not whole; 0 when it is, or when nothing is known."""
    return max(0, *(_reserve(of, settings) - left for left, of in _rooms(reading)), 0)


def pool(name: str, *, total: int, resident: int, leased: int, configured: int, n_blocks: int = 0) -> PoolStatus:
    """A pool's account in bytes. `total` is the budget of this moment, never less than what is in it."""
    free = total - resident - leased
    assert min(free, resident, leased, configured, n_blocks) >= 0, (name, total, resident, leased, configured, n_blocks)
    return PoolStatus(name, total, free, resident, leased, configured, n_blocks)


class Pools(Struct, frozen=True):
    """The three budgets, each exact: free + resident + leased = total."""

    live: PoolStatus  # running turns' KV
    host: PoolStatus
    disk: PoolStatus

    def __post_init__(self) -> None:
        for name, status in (("live", self.live), ("host", self.host), ("disk", self.disk)):
            parts = (status.bytes_free, status.bytes_resident, status.bytes_leased)
            assert status.name == name, (status.name, name)
            assert min(parts) >= 0 and sum(parts) == status.bytes_total, status

    @property
    def all(self) -> tuple[PoolStatus, ...]:
        """In the order of their speed."""
        return self.live, self.host, self.disk


def _rooms(reading: MemoryReading) -> list[tuple[int, int]]:
    """(bytes left, bytes in all) wherever memory can run out: the machine, the control group."""
    rooms = []
    if reading.available_bytes is not None:
        rooms.append((reading.available_bytes, reading.total_bytes or 0))
    if reading.cgroup_limit_bytes is not None and reading.cgroup_used_bytes is not None:
        rooms.append((reading.cgroup_limit_bytes - reading.cgroup_used_bytes, reading.cgroup_limit_bytes))
    return rooms


def _reserve(of_bytes: int, settings: GovernorSettings) -> int:
    return max(settings.reserve_bytes_min, int(of_bytes * settings.reserve_share))


def _spare_bytes(reading: MemoryReading, settings: GovernorSettings) -> int | None:
    """What may still be taken while calm; None when nothing is known."""
    rooms = [left - int(_reserve(of, settings) * settings.calm_share) for left, of in _rooms(reading)]
    return min(rooms) if rooms else None


def _critical(reading: MemoryReading, settings: GovernorSettings) -> bool:
    short = any(left < _reserve(of, settings) * settings.critical_share for left, of in _rooms(reading))
    return short or _above(reading.full_avg10, settings.stalled_percent_critical)


def _above(percent: float | None, bound: float) -> bool:
    return percent is not None and percent > bound
