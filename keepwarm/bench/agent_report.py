"""`bench agent`: its samples, and what they come to against the targets. Pure.

The first two turns write what later ones read, so shares count from the third on. A turn's share is what was read of its
prompt; the share judged is that of all their tokens together, and the lowest one of a turn stands beside it.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from keepwarm.bench.report import Ratio, percent, ratio

Caching = Literal["on", "off"]
FIRST_COUNTED = 3
READ_PERCENT_MIN = 95.0
LAST_TTFT_PERCENT_MAX = 10.0  # 5 % of the tokens, and each of the last ones costs up to twice what they do on average


class TurnSample(Struct, frozen=True):
    """One turn. The prompt is read + written + fresh tokens; `cause` is why not more was read, None: nothing more could be.

    `n_new` tokens are behind the prompt of the turn before.
    """

    number: int
    caching: Caching
    n_prompt: int
    n_new: int
    n_read: int
    n_written: int
    n_fresh: int
    ttft_ms: float
    phases: dict[str, float]
    outcome: str
    tier: str | None
    cause: str | None
    answer: str

    @property
    def read_percent(self) -> float:
        return 100 * self.n_read / self.n_prompt


class Samples(Struct):
    """Both sides, turn by turn."""

    turns: list[TurnSample] = []

    def of(self, caching: Caching) -> list[TurnSample]:
        return [one for one in self.turns if one.caching == caching]

    @property
    def counted(self) -> list[TurnSample]:
        """The turns that are to read most of their prompt."""
        return [one for one in self.of("on") if one.number >= FIRST_COUNTED]


def flat_medians(samples: Samples) -> dict[str, float]:
    """Times of the ends and sums of the tokens, by dotted name."""
    found: dict[str, float] = {}
    for caching in ("on", "off"):
        turns = samples.of(caching)
        found |= {
            f"{caching}.first_ttft_ms": turns[0].ttft_ms,
            f"{caching}.last_ttft_ms": turns[-1].ttft_ms,
            f"{caching}.all_ttft_ms": sum(one.ttft_ms for one in turns),
            f"{caching}.prompt_tokens": sum(one.n_prompt for one in turns),
            f"{caching}.read_tokens": sum(one.n_read for one in turns),
            f"{caching}.evaluated_tokens": sum(one.n_written + one.n_fresh for one in turns),
        }
    found["on.evaluated_beyond_new_tokens"] = sum(one.n_prompt - one.n_read - one.n_new for one in samples.counted)
    return {name: round(value, 3) for name, value in found.items()}


def ratios(samples: Samples) -> list[Ratio]:
    """All targets."""
    on, off, counted = samples.of("on"), samples.of("off"), samples.counted
    read = percent(sum(one.n_read for one in counted), sum(one.n_prompt for one in counted))
    equal = percent(_n_equal(on, off), len(on))
    last = percent(on[-1].ttft_ms, off[-1].ttft_ms)
    lowest = min((one.read_percent for one in counted), default=None)
    return [
        ratio("input tokens read, third turn on", read, "%", "≥", READ_PERCENT_MIN),
        ratio("the same, of the turn with the lowest share", lowest, "%", "≥", READ_PERCENT_MIN),
        ratio("TTFT of the last turn, of caching off", last, "%", "≤", LAST_TTFT_PERCENT_MAX),
        ratio("answers equal to those of caching off", equal, "%", "≥", 100.0),
    ]


def _n_equal(on: Sequence[TurnSample], off: Sequence[TurnSample]) -> int:
    return sum(one.answer == other.answer for one, other in zip(on, off, strict=True))
