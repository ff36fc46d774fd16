"""`bench ledger`: its samples, and what they come to against the target. Pure."""

from statistics import median

from msgspec import Struct

from keepwarm.bench.report import Ratio, ratio

TURNS_PER_S_MIN = 1000.0


class Round(Struct):
    """So many turns, each held and then settled, by callers that each do one after another."""

    n_turns: int
    spent_s: float

    @property
    def turns_per_s(self) -> float:
        return self.n_turns / self.spent_s


class Samples(Struct):
    """Everything measured. `write_ms` are single waits for the disk: 4 KB written to a file and synced."""

    many: list[Round]
    one: list[Round]
    write_ms: list[float]


def flat_medians(samples: Samples) -> dict[str, float]:
    """Medians by dotted name."""
    found = {
        "many.turns_per_s": median(one.turns_per_s for one in samples.many),
        "one.turns_per_s": median(one.turns_per_s for one in samples.one),
        "one.turn_ms": median(1000 / one.turns_per_s for one in samples.one),
        "disk.write_ms": median(samples.write_ms),
    }
    return {name: round(value, 3) for name, value in found.items()}


def ratios(samples: Samples, n_callers: int) -> list[Ratio]:
    """All targets."""
    found = flat_medians(samples)["many.turns_per_s"]
    return [ratio(f"settled turns, {n_callers} callers", found, "/s", "≥", TURNS_PER_S_MIN)]
