"""Files that clients upload to be read by the model: their values, and the words for one that is not there.

A file is a tenant's, and known to the dialect it was uploaded in: the lists and calls of another show nothing of it. A
prompt may name any of its tenant's. Its state goes one way, PROCESSING to ACTIVE or FAILED; its expiry is decided by the
clock at look-up, no sweep has to have run. What a client called a file is text to show and never part of a path.
"""

from enum import Enum

from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind


class FileState(Enum):
    """The names are Gemini's."""

    PROCESSING = "PROCESSING"  # whole and on disk; its text is being extracted
    ACTIVE = "ACTIVE"  # its text is on disk too
    FAILED = "FAILED"  # it has no text: `error` says why


class StoredFile(Struct, frozen=True):
    """A file as stored. Times in unix seconds; `expires_at` None: until it is deleted.

    `key` names it on disk: random, ours. `seq` is its place in the order of creation. `name` is the client's, or "".
    """

    id: str
    tenant: str
    dialect: str
    key: str
    name: str
    media_type: str
    n_bytes: int
    sha256: bytes
    created_at: float
    updated_at: float
    expires_at: float | None
    state: FileState
    error: str | None = None
    seq: int = 0

    @property
    def title(self) -> str | None:
        """What the model is told it is called."""
        return self.name or None

    def is_live(self, now: float) -> bool:
        return self.expires_at is None or now < self.expires_at


class NewFile(Struct, frozen=True):
    """What a client says of a file before it sends it; None where it says nothing. `ttl_s` None: kept until deleted.

    `n_bytes` is a promise: an upload that ends with another number of bytes is refused. Without an `id` it gets one that
    begins with `id_prefix`.
    """

    dialect: str
    name: str = ""
    media_type: str | None = None
    n_bytes: int | None = None
    id: str | None = None
    ttl_s: float | None = None
    id_prefix: str = ""


def unknown_file(file_id: str, param: str | None = None) -> ApiError:
    """In Gemini's words: its clients compare them."""
    message = f"You do not have permission to access the File {file_id[:100]} or it may not exist."
    return ApiError(ErrorKind.UNKNOWN_FILE, message, param=param)
