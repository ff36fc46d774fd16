from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import pytest

from keepwarm.cache.encode import (
    CACHE_ENTRY_BYTES,
    CACHED_CHARS_MIN,
    PRIVATE_USE,
    WINDOW_CHARS,
    WINDOW_CHARS_MAX,
    Encoded,
    Encoder,
    FragmentCache,
    Sentinels,
    Shield,
    choose_sentinels,
    unweave,
    weave,
)
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.prompt import common_prefix
from keepwarm.engine import SpecialToken
from tests.tokenizers import SPECIALS, ByteTokenizer, WordTokenizer, naive_encode

SHIELD, MARK = "\ue000", "\ue001"
LONG = "All happy families are alike; each unhappy family is unhappy in its own way. "


def encoder(tokenizer: ByteTokenizer, n_bytes: int = 1 << 20) -> Encoder:
    return Encoder(tokenizer, fragment_cache_bytes=n_bytes)


def marked(tokenizer: ByteTokenizer, text: str) -> Encoded:
    """`text` tokenised with an end asked for at each ¦ in it."""
    runs = text.split("¦")
    offsets = [0, *accumulate(map(len, runs))][1:-1]
    return encoder(tokenizer).encode("t", "".join(runs), SHIELD, offsets)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "<|im_start|>user\nhi<|im_end|>\n",
        "<|im_start|><|im_end|><s>",
        "<|im_start<|im_start|>|>",
        "left  [MASK]  right",
        "left  [SEP] \n right [SEP]",
        "a [SEP]  [MASK] b",
        "<s>already there",
        "你好<|eot|>é",
    ],
)
@pytest.mark.parametrize("bos", [None, 1004])
def test_tokens_are_those_of_a_plain_split(text: str, bos: int | None) -> None:
    tokenizer = ByteTokenizer(bos=bos)
    assert encoder(tokenizer).encode("t", text).tokens.tolist() == naive_encode(tokenizer, text)


def test_overlapping_control_tokens_are_cut_longest_first_over_the_whole_text() -> None:
    tokenizer = ByteTokenizer(specials=(SpecialToken("ab<", 1001), SpecialToken("<long>", 1002)))
    tokens = encoder(tokenizer).encode("t", "xab<long>").tokens.tolist()
    assert tokens == [*b"xab", 1002] == naive_encode(tokenizer, "xab<long>")


def test_a_longer_control_token_wins_over_its_beginning() -> None:
    tokenizer = ByteTokenizer(specials=(SpecialToken("<a>", 1001), SpecialToken("<a>b", 1002)))
    assert encoder(tokenizer).encode("t", "<a>b<a>c").tokens.tolist() == [1002, 1001, *b"c"]


def test_tokens_are_int32_and_read_only() -> None:
    tokens = encoder(ByteTokenizer()).encode("t", "<s>" + LONG).tokens
    assert tokens.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_shields_leave_no_trace_and_do_not_count() -> None:
    text = f"a.<{SHIELD}|im_end|>{SHIELD}b.c"
    encoded = encoder(ByteTokenizer()).encode("t", text, SHIELD, [2, 14])
    assert bytes(encoded.tokens.tolist()) == b"a.<|im_end|>b.c"
    assert encoded.ends == (1, 13)


def test_sentinels_of_another_request_are_ordinary_text() -> None:
    assert bytes(encoder(ByteTokenizer()).encode("t", f"a{SHIELD}b").tokens.tolist()) == f"a{SHIELD}b".encode()


def test_a_mark_lies_where_the_text_before_it_ends_but_for_its_last_word() -> None:
    encoded = marked(ByteTokenizer(), "<|im_start|>¦one.¦two.¦<|im_end|>¦")
    assert encoded.ends == (1, 4, 8, 10)
    assert len(encoded.tokens) == 10


def test_a_place_inside_a_control_token_is_before_it() -> None:
    text = f"a{SHIELD}b<s><|eot|>"
    before = [encoder(ByteTokenizer()).before_control(text, SHIELD, offset) for offset in range(13)]
    assert before == [0, 1, 2, 2, 2, 5, 5, 5, 5, 5, 5, 5, 12]


def test_places_come_in_the_order_they_were_asked_for() -> None:
    assert encoder(ByteTokenizer()).encode("t", "ab.de.", SHIELD, [6, 3, 0, 3]).ends == (5, 2, 0, 2)


def test_a_mark_inside_a_token_moves_before_it() -> None:
    encoded = marked(WordTokenizer(), "some wor¦ds here")
    assert encoded.tokens.tolist() == WordTokenizer().encode_plain("some words here")
    assert encoded.ends == (1,)
    assert marked(ByteTokenizer(), "a<|im_¦end|>b").ends == (1,)


@pytest.mark.parametrize(
    "head, n_settled",
    [
        ("a word", 1),
        ("a word.", 2),
        ("a word. ", 2),
        ("a\n", 1),
        ("a\n\n(", 1),
        ("word", 0),
        ("7 of 12", 2),
        ("好.一", 1),
    ],
)
def test_tokens_that_what_follows_could_change_are_not_before_the_mark(head: str, n_settled: int) -> None:
    for tail in ("", "s", " b", "9", ".", "\n", " \n", "<|im_end|>", "é", "\t\n"):
        encoded = marked(WordTokenizer(), f"<s>{head}¦{tail}")
        assert encoded.ends == (1 + n_settled,)
        assert encoded.tokens[: encoded.ends[0]].tolist() == [1004, *WordTokenizer().encode_plain(head)[:n_settled]]


def test_tokens_across_words_are_found_by_trying() -> None:
    class AcrossWords(WordTokenizer):
        def encode_plain(self, text: str) -> list[int]:
            before, joined, after = text.partition("word.a")
            return [*super().encode_plain(before), *([3000] if joined else []), *super().encode_plain(after)]

    assert marked(AcrossWords(), "some word.¦").ends == marked(AcrossWords(), "some word.¦a").ends == (1,)


@pytest.mark.parametrize("n_chars", [WINDOW_CHARS, WINDOW_CHARS * 4, WINDOW_CHARS_MAX, WINDOW_CHARS_MAX * 2])
def test_a_long_word_before_a_mark_is_seen_whole_or_left_out(n_chars: int) -> None:
    head = "two words " + "x" * n_chars
    n_settled = len(WordTokenizer().encode_plain("two words"))
    assert marked(WordTokenizer(), head + "¦").ends == marked(WordTokenizer(), head + "¦y").ends == (n_settled,)


def test_the_begin_token_moves_marks() -> None:
    assert marked(ByteTokenizer(bos=1004), "¦one.¦two").ends == (0, 4)


def test_a_mark_in_swallowed_white_space_stays_beside_its_text() -> None:
    encoded = marked(ByteTokenizer(), "one.  ¦[MASK]two.[SEP] ¦ six.¦")
    assert bytes(i for i in encoded.tokens.tolist() if i < 256) == b"one.two.six."
    assert encoded.ends == (3, 10, 13)


def test_text_seen_before_is_not_tokenised_again() -> None:
    tokenizer = ByteTokenizer()
    subject = encoder(tokenizer)
    first = subject.encode("t", f"<|im_start|>{LONG}<|im_end|>one")
    n_bytes = tokenizer.n_bytes
    second = subject.encode("t", f"<|im_start|>{LONG}<|im_end|>two")
    assert tokenizer.n_bytes == n_bytes + len("two")
    assert common_prefix(first.tokens, second.tokens) == len(LONG) + 2


def test_tenants_do_not_see_what_others_have_tokenised() -> None:
    tokenizer = ByteTokenizer()
    subject = encoder(tokenizer)
    subject.encode("t", LONG)
    subject.encode("u", LONG)
    assert tokenizer.n_bytes == 2 * len(LONG)


def test_short_fragments_are_not_kept() -> None:
    subject = encoder(ByteTokenizer())
    subject.encode("t", "x" * (CACHED_CHARS_MIN - 1))
    assert len(subject.cache) == 0
    subject.encode("t", "x" * CACHED_CHARS_MIN)
    assert len(subject.cache) == 1


def cover(specials: Sequence[SpecialToken], text: str) -> str:
    return weave(text, [(position, "·") for position in Shield(specials).everywhere(text)])


def entry(cache: FragmentCache, text: str) -> int:
    before = cache.n_bytes
    cache.put("t", text, np.zeros(len(text), np.int32))
    return cache.n_bytes - before


def test_the_cache_counts_texts_and_tokens_and_forgets_the_least_recently_used() -> None:
    unbounded = FragmentCache(1 << 20)
    size = entry(unbounded, "a" * 100)
    assert size > 5 * 100 + CACHE_ENTRY_BYTES
    cache = FragmentCache(3 * size)
    for letter in "abc":
        entry(cache, letter * 100)
    assert cache.get("t", "a" * 100) is not None
    entry(cache, "d" * 100)
    assert cache.get("t", "b" * 100) is None
    assert cache.get("t", "a" * 100) is not None
    assert (len(cache), cache.n_bytes) == (3, 3 * size)


def test_what_does_not_fit_is_not_kept() -> None:
    cache = FragmentCache(100)
    entry(cache, "a" * 100)
    assert (len(cache), cache.n_bytes) == (0, 0)


def test_sentinels_avoid_what_the_request_contains() -> None:
    assert choose_sentinels(["plain", "caf\u00e9"], 1) == Sentinels(SHIELD, MARK)
    assert choose_sentinels([f"a{MARK}"]) == Sentinels(SHIELD)
    assert choose_sentinels([f"a{SHIELD}", "\ue002 \ue003", "é"], 2) == Sentinels("\ue001", "\ue004\ue005")


def test_a_request_that_uses_up_all_private_characters_is_refused() -> None:
    every = "".join(chr(code) for low, high in PRIVATE_USE for code in range(low, high + 1))
    assert choose_sentinels([every[:-2]], 1) == Sentinels(every[-2], every[-1])
    with pytest.raises(ApiError) as caught:
        choose_sentinels([every[:-1]], 1)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert "137,467" in caught.value.message


def test_what_was_woven_in_is_found_and_taken_out() -> None:
    assert unweave("abc", "") == ("abc", [])
    assert unweave("abc", "12") == ("abc", [None, None])
    assert unweave("é1a23b2", "1234") == ("éab", [1, 2, 2, None])


def test_weave_inserts_in_front_of_positions() -> None:
    assert weave("abc", [(3, "!"), (0, "<"), (1, "·")]) == "<a·bc!"
    assert weave("abc", []) == "abc"


@pytest.mark.parametrize(
    "text, covered",
    [
        ("harmless", "harmless"),
        ("", ""),
        ("x<|im_end|>y", "x<·|im_end|>y"),
        ("<|im_end|><s>", "<·|im_end|><·s>"),
        ("ends with <", "ends with <·"),
        ("ends with <|im_e", "ends with <|im_e·"),
        ("nd|> begins", "·nd|> begins"),
        ("> begins", "·> begins"),
        ("a < b > c", "a < b > c"),
        ("im_end", "·im_end"),
        ("m", "·m"),
        ("im_ends", "im_ends"),
    ],
)
def test_the_shield_breaks_what_could_be_a_control_token(text: str, covered: str) -> None:
    assert cover(SPECIALS[:4], text) == covered


def test_the_shield_breaks_overlapping_occurrences() -> None:
    covered = cover([SpecialToken("aba", 1)], "xababay")
    assert "aba" not in covered
    assert covered.replace("·", "") == "xababay"


def test_white_space_tokens_and_single_characters_are_no_threat() -> None:
    assert cover([SpecialToken("\n\n", 1), SpecialToken("#", 2)], "a\n\n#\n") == "a\n\n#\n"
    assert cover([], "anything") == "anything"


def test_json_is_shielded_less_for_templates_look_things_up_in_it() -> None:
    shield = Shield(SPECIALS)
    assert (shield.inside("im_end"), shield.around("im_end"), shield.everywhere("im_end")) == ([], [], [0])
    assert (shield.inside("<s"), shield.around("<s"), shield.everywhere("<s")) == ([], [2], [2])
    assert shield.inside("a<s>") == shield.everywhere("a<s>") == [2]


def test_single_character_specials_are_left_to_the_tokenizer() -> None:
    tokenizer = ByteTokenizer(specials=(SpecialToken("#", 1001),))
    assert encoder(tokenizer).encode("t", "a#b").tokens.tolist() == list(b"a#b")


def test_common_prefix() -> None:
    a, b = np.array([1, 2, 3], np.int32), np.array([1, 2, 4, 5], np.int32)
    assert [common_prefix(x, y) for x, y in pairwise([a, b, b[:2], b[:0]])] == [2, 2, 0]
