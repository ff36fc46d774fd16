"""What a call costs by a price sheet. Pure, in integers: 1 nano is 10⁻⁹ of the sheet's currency.

Kimi's scheme: creating an object is paid per token once, keeping it per token and begun minute; a call that uses it pays a
fee, its cached tokens nothing, its other tokens the ordinary price; a call that does not use it pays the ordinary price.
"""

from msgspec import Struct

NANO = 10**9
SECONDS_PER_MINUTE = 60


class ChatPrice(Struct, frozen=True):
    """The ordinary price of tokens for one size of model."""

    size: str
    input_nano_per_token: int
    output_nano_per_token: int


class PriceSheet(Struct, frozen=True):
    """A vendor's prices at one time."""

    name: str
    currency: str
    creation_nano_per_token: int
    storage_nano_per_token_minute: int
    call_nano: int
    chat: tuple[ChatPrice, ...]

    def chat_price(self, size: str) -> ChatPrice:
        """Raises KeyError when the sheet has no such size."""
        for price in self.chat:
            if price.size == size:
                return price
        raise KeyError(size)


KIMI_LAUNCH = PriceSheet(  # 2024-07-01: ¥24/M creation, ¥10/M and minute storage, ¥0.02 a call, ¥12/24/60 per M tokens
    name="kimi-2024-07-01",
    currency="CNY",
    creation_nano_per_token=24_000,
    storage_nano_per_token_minute=10_000,
    call_nano=20_000_000,
    chat=(ChatPrice("8k", 12_000, 12_000), ChatPrice("32k", 24_000, 24_000), ChatPrice("128k", 60_000, 60_000)),
)


def call_nano(sheet: PriceSheet, size: str, n_prompt: int, n_output: int) -> int:
    """A call that uses no cache object."""
    price = sheet.chat_price(size)
    return n_prompt * price.input_nano_per_token + n_output * price.output_nano_per_token


def cached_call_nano(sheet: PriceSheet, size: str, n_prompt: int, n_cached: int, n_output: int) -> int:
    """A call that used a cache object for `n_cached` of its `n_prompt` tokens; an ordinary one when that is 0."""
    assert 0 <= n_cached <= n_prompt, f"{n_cached} of {n_prompt} prompt tokens cannot be cached"
    fee = sheet.call_nano if n_cached else 0
    return fee + call_nano(sheet, size, n_prompt - n_cached, n_output)


def creation_nano(sheet: PriceSheet, n_tokens: int) -> int:
    """Creating an object of `n_tokens`."""
    return n_tokens * sheet.creation_nano_per_token


def storage_nano(sheet: PriceSheet, n_tokens: int, lived_s: int) -> int:
    """Keeping an object of `n_tokens` for `lived_s` seconds; a begun minute counts in full."""
    begun_minutes = -(-lived_s // SECONDS_PER_MINUTE)
    return n_tokens * begun_minutes * sheet.storage_nano_per_token_minute
