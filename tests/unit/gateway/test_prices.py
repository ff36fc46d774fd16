import pytest

from keepwarm.gateway.prices import (
    KIMI_LAUNCH,
    NANO,
    PriceSheet,
    cached_call_nano,
    call_nano,
    creation_nano,
    storage_nano,
)


def test_kimis_example_of_100k_tokens_ten_minutes_and_five_calls() -> None:
    n_tokens = 100_000
    creation = creation_nano(KIMI_LAUNCH, n_tokens)
    storage = storage_nano(KIMI_LAUNCH, n_tokens, 10 * 60)
    fees = 5 * cached_call_nano(KIMI_LAUNCH, "128k", n_tokens, n_tokens, 0)
    assert (creation, storage, fees) == (2_400_000_000, 10_000_000_000, 100_000_000)  # ¥2.4 + ¥10 + ¥0.1
    assert creation + storage + fees == 12_500_000_000


@pytest.mark.parametrize("size, per_million", [("8k", 12), ("32k", 24), ("128k", 60)])
def test_ordinary_calls(size: str, per_million: int) -> None:
    assert call_nano(KIMI_LAUNCH, size, 1_000_000, 0) == per_million * NANO
    assert call_nano(KIMI_LAUNCH, size, 0, 1_000_000) == per_million * NANO
    assert call_nano(KIMI_LAUNCH, size, 3, 4) == 7 * per_million * 1000


def test_cached_tokens_are_free_and_the_rest_is_ordinary() -> None:
    assert cached_call_nano(KIMI_LAUNCH, "8k", 5_016, 5_000, 48) == 20_000_000 + 64 * 12_000


def test_a_call_without_a_hit_pays_no_fee() -> None:
    assert cached_call_nano(KIMI_LAUNCH, "8k", 5_016, 0, 48) == call_nano(KIMI_LAUNCH, "8k", 5_016, 48)


@pytest.mark.parametrize("lived_s, minutes", [(0, 0), (1, 1), (59, 1), (60, 1), (61, 2), (600, 10), (601, 11)])
def test_a_begun_minute_counts_in_full(lived_s: int, minutes: int) -> None:
    assert storage_nano(KIMI_LAUNCH, 1_000_000, lived_s) == minutes * 10 * NANO


def test_more_cached_than_there_is_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        cached_call_nano(KIMI_LAUNCH, "8k", 10, 11, 0)


def test_an_unknown_size_has_no_price() -> None:
    with pytest.raises(KeyError):
        PriceSheet("empty", "CNY", 1, 1, 1, ()).chat_price("8k")
