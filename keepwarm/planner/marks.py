"""Where marks pay: each place alone, and the best set found by adding the best place again and again."""

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from keepwarm.billing.sheet import ModelPrices
from keepwarm.planner.cost import Spent, spent
from keepwarm.planner.schemes import marked
from keepwarm.planner.traffic import Prompt

MARKS_MAX = 4  # as many as Anthropic's, OpenAI's and MiniMax's requests may have


class Tried(Struct, frozen=True):
    """One place alone: `n_prompts` have it, at `n_tokens_mean` on average; what marking it saves, negative for a loss."""

    place: str
    n_prompts: int
    n_tokens_mean: int
    saving_nano: int


class Best(Struct, frozen=True):
    """The places to mark, in the order in which they were chosen: each one saves `gains_nano` more. Empty: none pays."""

    places: tuple[str, ...]
    gains_nano: tuple[int, ...]
    spent: Spent
    tried: tuple[Tried, ...]


class Marking(Struct, frozen=True):
    """How a vendor's breakpoints work. Places in `short` live for `short_s` whatever the lifetime of the others is."""

    ttl_s: int
    tokens_min: int
    lookback: int | None
    short: tuple[str, ...] = ()
    short_s: int = 0

    def replayed(self, prompts: Sequence[Prompt], prices: ModelPrices, places: Sequence[str]) -> Spent:
        marks: Mapping[str, int] = {
            place: self.short_s if place in self.short else self.ttl_s for place in places
        }  # fmt: skip
        return spent(prices, marked(prompts, marks, tokens_min=self.tokens_min, lookback=self.lookback))


def best_marks(
    prompts: Sequence[Prompt],
    prices: ModelPrices,
    places: Sequence[str],
    marking: Marking,
    on_replay: Callable[[], None] = lambda: None,
) -> Best:
    """The set that adding the best place until none saves more, or there are `MARKS_MAX`, comes to.

    The order of `places` decides between equals. At most about `MARKS_MAX` times as many replays as there are places.
    """

    def replayed(chosen: Sequence[str]) -> Spent:
        on_replay()
        return marking.replayed(prompts, prices, chosen)

    now = none = replayed(())
    alone = {place: replayed((place,)) for place in places}
    chosen: list[str] = []
    gains: list[int] = []
    candidates = alone
    while candidates:
        place = min(candidates, key=lambda name: candidates[name].charge.total)
        gain = now.charge.total - candidates[place].charge.total
        if gain <= 0:
            break
        chosen.append(place)
        gains.append(gain)
        now = candidates[place]
        rest = [name for name in places if name not in chosen] if len(chosen) < MARKS_MAX else []
        candidates = {name: replayed((*chosen, name)) for name in rest}
    tried = tuple(_tried(prompts, place, none.charge.total - one.charge.total) for place, one in alone.items())
    return Best(tuple(chosen), tuple(gains), now, tried)


def _tried(prompts: Sequence[Prompt], place: str, saving_nano: int) -> Tried:
    ends = [spot.end for prompt in prompts if (spot := prompt.spot(place)) is not None]
    return Tried(place, len(ends), round(sum(ends) / len(ends)) if ends else 0, saving_nano)
