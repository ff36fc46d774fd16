"""Whether reading a stored prefix is faster than computing it again: speeds measured while the server runs, one decision.

Speeds are sums that forget: each observation takes a small share of the earlier ones' weight, and counts by its size, so
the quotient is the time to expect for so many bytes or tokens. Prefill costs more per token the more tokens lie before
it, so a line through (depth, seconds per token) is fitted, drawn towards the growth that eviction assumes while nearly
all chunks seen lay at one depth. Fixed costs of a read are not known apart; they are part of the averages.

The decision is pure. What was never measured is read. What is expected to take equally long is read. Now and then a hit
that would be skipped is read all the same: what is never read would never be measured again. Leased prefixes are the
caller's: it reads them without asking.
"""

from typing import Literal

RETRY_HITS = 16  # one in this many hits that are not worth reading is read in whole
FORGET = 0.05  # share of the weight that an observation takes from all earlier ones
DOUBLING_TOKENS = 4096  # prior: prefill time per token doubles over so many (docs/eviction.md assumes the same)
PRIOR_VARIANCE = 64.0**2  # of depths, in tokens²: the prior's slope counts like depths one block apart

Tier = Literal["host", "disk"]


class Speeds:
    """What one engine process has measured. One thread writes the prefill, another may write a tier's reads."""

    def __init__(self) -> None:
        self._prefill = _Line()
        self._host, self._disk = _Quotient(), _Quotient()

    def observe_prefill(self, n_tokens: int, depth: int, seconds: float) -> None:
        """`n_tokens` behind `depth` others were evaluated in `seconds`."""
        if n_tokens > 0 and seconds > 0:
            self._prefill.add(depth + n_tokens / 2, seconds / n_tokens, n_tokens)

    def observe_restore(self, tier: Tier, n_bytes: int, seconds: float) -> None:
        """`n_bytes` of stored state were read from a tier in `seconds`."""
        if n_bytes > 0 and seconds > 0:
            (self._host if tier == "host" else self._disk).add(seconds, n_bytes)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """At the depths seen lately."""
        return None if self._prefill.mean is None else 1 / self._prefill.mean

    @property
    def host_bytes_per_s(self) -> float | None:
        return None if self._host.value is None else 1 / self._host.value

    @property
    def disk_bytes_per_s(self) -> float | None:
        return None if self._disk.value is None else 1 / self._disk.value

    def prefill_s(self, start: int, end: int) -> float | None:
        """Expected seconds to compute tokens start..end-1, None when nothing was measured."""
        line = self._prefill.line
        if line is None:
            return None
        at_zero, slope = line
        return (end - start) * (at_zero + slope * (start + end) / 2)

    def read_s(self, tier: Tier, n_bytes: int) -> float | None:
        """Expected seconds to read so many bytes: 0 for none, None when nothing was measured."""
        per_byte = (self._host if tier == "host" else self._disk).value
        return 0.0 if not n_bytes else None if per_byte is None else n_bytes * per_byte


def worth(n_host_tokens: int, n_disk_tokens: int, bytes_per_token: int, speeds: Speeds, n_skips: int) -> int:
    """How many of the found tokens to read: all, the leading part that lies in host RAM, or none.

    `n_skips` counts the hits so far for which `fastest` gave less than all, those included that were read all the same:
    if it stood still after one of these, every later hit would be read.
    """
    n = fastest(n_host_tokens, n_disk_tokens, bytes_per_token, speeds)
    if n_skips % RETRY_HITS == RETRY_HITS - 1:
        return n_host_tokens + n_disk_tokens
    return n


def fastest(n_host_tokens: int, n_disk_tokens: int, bytes_per_token: int, speeds: Speeds) -> int:
    """As `worth`, by expected time alone: host tokens come first, and what is not read is computed behind what is."""
    n_found = n_host_tokens + n_disk_tokens
    host_s = speeds.read_s("host", n_host_tokens * bytes_per_token)
    disk_s = speeds.read_s("disk", n_disk_tokens * bytes_per_token)
    all_s, rest_s = speeds.prefill_s(0, n_found), speeds.prefill_s(n_host_tokens, n_found)
    if host_s is None or disk_s is None or all_s is None or rest_s is None:
        return n_found
    expected_s = ((host_s + disk_s, n_found), (host_s + rest_s, n_host_tokens), (all_s, 0))
    return min(expected_s, key=lambda choice: (choice[0], -choice[1]))[1]


class _Quotient:
    """Seconds per unit over observations that fade."""

    def __init__(self) -> None:
        self._seconds = self._units = 0.0

    def add(self, seconds: float, units: float) -> None:
        self._seconds = self._seconds * (1 - FORGET) + seconds
        self._units = self._units * (1 - FORGET) + units

    @property
    def value(self) -> float | None:
        return self._seconds / self._units if self._units else None


class _Line:
    """y over x, by least squares over weighted observations that fade; means and (co)variances are kept, not sums."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float, weight: float) -> None:
        kept = self._weight * (1 - FORGET)
        self._weight = kept + weight
        share = weight / self._weight
        dx, dy = x - self._x, y - self._y
        self._x += share * dx
        self._y += share * dy
        self._xx = (1 - share) * (self._xx + share * dx * dx)
        self._xy = (1 - share) * (self._xy + share * dx * dy)

    @property
    def mean(self) -> float | None:
        return self._y if self._weight else None

    @property
    def line(self) -> tuple[float, float] | None:
        """(y at 0, slope), neither below 0: prefill does not get faster with depth, nor free."""
        if not self._weight:
            return None
        prior = self._y / (DOUBLING_TOKENS + self._x)
        slope = (self._xy + PRIOR_VARIANCE * prior) / (self._xx + PRIOR_VARIANCE)
        slope = min(max(slope, 0.0), self._y / self._x if self._x else 0.0)
        return max(self._y - slope * self._x, 0.0), slope
