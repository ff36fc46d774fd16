"""The format of a stored block: a header, padded so that the body begins at a multiple of 4096, then the body. Pure.

Little-endian. The header names everything that decides whether the body may be used: the format's version, the
fingerprint of model, template, KV type and layout, the block's place in its chain, its token ids, size and checksum. Its
last 8 bytes are the xxh3 of all before, padding too, so no flipped bit in it goes unseen. What is wrong comes back as a
`Damage`, in this order: not ours, another version, a header that contradicts itself, a flipped bit, another model.
"""

import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

from keepwarm.engine.tiers import BlockHead, Damage

PAGE_BYTES = 4096  # of a file system and of O_DIRECT; what a block costs is a multiple of it
VERSION = 1
SUFFIX = ".kv"
MAGIC = b"KEEPWARM"

# magic, version, header bytes, fingerprint, key, parent, start, closed, n_tokens, n_bytes, xxh3 of the body
_FIXED = struct.Struct("<8sII32s32s32sQIIQQ")
_SUM = struct.Struct("<Q")


def checksum(body: NDArray[np.uint8]) -> int:
    """The xxh3 (64 bits) of a body. Runs without the interpreter's lock."""
    return xxhash.xxh3_64_intdigest(body.data)


def header_bytes(n_tokens: int) -> int:
    """Size of the header of a block of so many tokens: where its body begins."""
    return _padded(_FIXED.size + 4 * n_tokens + _SUM.size)


def file_bytes(head: BlockHead) -> int:
    return header_bytes(len(head.tokens)) + head.n_bytes


def cost(head: BlockHead) -> int:
    """Bytes of the disk that the block's file takes: whole pages."""
    return _padded(file_bytes(head))


def encode(head: BlockHead, fingerprint: bytes, body_sum: int) -> NDArray[np.uint8]:
    """The header, shape (header_bytes,)."""
    assert len(head.key) == len(head.parent) == len(fingerprint) == 32
    n_header, n_tokens = header_bytes(len(head.tokens)), len(head.tokens)
    out = bytearray(n_header)
    _FIXED.pack_into(
        out, 0, MAGIC, VERSION, n_header, fingerprint, head.key, head.parent, head.start, head.closed, n_tokens,
        head.n_bytes, body_sum,
    )  # fmt: skip
    out[_FIXED.size : _FIXED.size + 4 * n_tokens] = head.tokens.astype("<u4").tobytes()
    _SUM.pack_into(out, n_header - _SUM.size, xxhash.xxh3_64_intdigest(memoryview(out)[: -_SUM.size]))
    return np.frombuffer(out, np.uint8)


def length(start: bytes) -> int | Damage:
    """How long the header is that begins with these bytes (up to a page of them)."""
    if len(start) < PAGE_BYTES:
        return Damage.TRUNCATED
    magic, version, n_header = _FIXED.unpack_from(start)[:3]
    if magic != MAGIC:
        return Damage.FOREIGN if any(start) else Damage.TORN  # a power cut can leave zeros
    if version != VERSION:
        return Damage.STALE
    if n_header == 0 or n_header % PAGE_BYTES:
        return Damage.TORN
    return int(n_header)


def decode(header: bytes, fingerprint: bytes) -> tuple[BlockHead, int] | Damage:
    """The head, and the checksum its body must have; or why the file cannot be used."""
    n_header = length(header)
    if isinstance(n_header, Damage):
        return n_header
    if n_header != len(header):
        return Damage.TORN
    if _SUM.unpack_from(header, n_header - _SUM.size)[0] != xxhash.xxh3_64_intdigest(memoryview(header)[: -_SUM.size]):
        return Damage.FLIPPED
    _, _, _, model, key, parent, start, closed, n_tokens, n_bytes, body_sum = _FIXED.unpack_from(header)
    if model != fingerprint:
        return Damage.STALE
    if closed > 1 or header_bytes(n_tokens) != n_header:
        return Damage.TORN
    tokens = np.frombuffer(header, "<i4", n_tokens, _FIXED.size).astype(np.int32)
    tokens.flags.writeable = False
    return BlockHead(key, parent, start, tokens, bool(closed), n_bytes), body_sum


def name_of(key: bytes) -> str:
    return key.hex() + SUFFIX


def key_of(name: str) -> bytes | None:
    """The key a file's name stands for; None when it is no block's name."""
    stem = name.removesuffix(SUFFIX)
    if stem == name or len(stem) != 64 or not set(stem) <= set("0123456789abcdef"):
        return None
    return bytes.fromhex(stem)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
