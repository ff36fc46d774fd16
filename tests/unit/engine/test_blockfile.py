"""The block file's header: what is written is read, and whatever is wrong with it is seen."""

import struct

import pytest
import xxhash

from keepwarm.engine import blockfile
from keepwarm.engine.tiers import Damage
from tests.faults import a_block, same_head

MODEL = bytes(range(32))


@pytest.fixture
def header():
    head, body = a_block(1, n_tokens=64)
    return blockfile.encode(head, MODEL, blockfile.checksum(body))


def summed(header):
    """The header with its checksum made right again."""
    content = bytearray(header)
    content[-8:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(content[:-8])))
    return bytes(content)


@pytest.mark.parametrize("n_tokens", [0, 1, 64, 900, 1_000, 10_000])
def test_a_head_comes_back_as_it_was(n_tokens):
    head, body = a_block(3, n_tokens=n_tokens)
    header = blockfile.encode(head, MODEL, blockfile.checksum(body))
    found, body_sum = blockfile.decode(header.tobytes(), MODEL)
    assert same_head(found, head)
    assert not found.tokens.flags.writeable
    assert body_sum == xxhash.xxh3_64_intdigest(body.tobytes())
    assert len(header) == blockfile.header_bytes(n_tokens) == blockfile.length(header[:4096].tobytes())


@pytest.mark.parametrize("n_tokens", range(950, 1_000, 3))
def test_the_body_begins_at_a_page(n_tokens):
    head, _ = a_block(3, 5_000, n_tokens)
    assert blockfile.header_bytes(n_tokens) % 4096 == 0
    assert blockfile.file_bytes(head) == blockfile.header_bytes(n_tokens) + 5_000
    assert blockfile.cost(head) == blockfile.header_bytes(n_tokens) + 8_192


def test_the_layout_is_the_documented_one(header):
    """A change of the layout needs a new version: files of the old one are on users' disks."""
    head, body = a_block(1, n_tokens=64)
    content = header.tobytes()
    assert content[:16] == b"KEEPWARM" + struct.pack("<II", 1, 4096)
    assert content[16:112] == MODEL + head.key + head.parent
    assert content[112:144] == struct.pack("<QIIQQ", 64, 1, 64, 5_000, xxhash.xxh3_64_intdigest(body.tobytes()))
    assert content[144:400] == head.tokens.astype("<u4").tobytes()
    assert not any(content[400:-8])
    assert content[-8:] == struct.pack("<Q", xxhash.xxh3_64_intdigest(content[:-8]))


def test_every_flipped_bit_is_seen(header):
    content = bytearray(header)
    for at in range(len(content)):
        for bit in (0, 3, 7):
            content[at] ^= 1 << bit
            damage = blockfile.decode(bytes(content), MODEL)
            content[at] ^= 1 << bit
            assert isinstance(damage, Damage), at
            expected = {Damage.FOREIGN} if at < 8 else {Damage.STALE} if at < 12 else {Damage.TORN, Damage.FLIPPED}
            assert damage in expected, at


@pytest.mark.parametrize(
    "at, value, damage",
    [
        (0, b"NOTOURS!", Damage.FOREIGN),
        (8, struct.pack("<I", 2), Damage.STALE),
        (12, struct.pack("<I", 0), Damage.TORN),
        (12, struct.pack("<I", 4_097), Damage.TORN),
        (12, struct.pack("<I", 8_192), Damage.TORN),
        (16, bytes(32), Damage.STALE),
        (120, struct.pack("<I", 2), Damage.TORN),
        (124, struct.pack("<I", 5_000), Damage.TORN),
        (124, struct.pack("<I", 0xFFFFFFFF), Damage.TORN),
    ],
)
def test_a_header_that_is_whole_but_wrong(header, at, value, damage):
    content = bytearray(header)
    content[at : at + len(value)] = value
    assert blockfile.decode(summed(content), MODEL) is damage


def test_headers_cut_short_and_of_zeros(header):
    for n in (0, 7, 151, 4_095):
        assert blockfile.decode(header[:n].tobytes(), MODEL) is Damage.TRUNCATED
    assert blockfile.decode(bytes(4_096), MODEL) is Damage.TORN
    assert blockfile.decode(header.tobytes() + bytes(4_096), MODEL) is Damage.TORN


def test_names():
    key = bytes(range(32))
    assert blockfile.key_of(blockfile.name_of(key)) == key
    stem = key.hex()
    for name in (
        "",
        ".kv",
        stem,
        stem + ".kv.1.tmp",
        stem[:-1] + ".kv",
        stem.upper() + ".kv",
        stem + "0.kv",
        "../x.kv",
    ):
        assert blockfile.key_of(name) is None
