"""A row as the ledger has it: the columns of `tables.ledger_rows` in their order, unread."""

from msgspec import Struct

from keepwarm.tables import ledger_rows


class Written(Struct, frozen=True):
    """Types are those of the columns; whether the values go together is for who reads them to see."""

    seq: int
    id: str
    kind: str
    at: float
    organisation: str
    project: str | None
    key_id: int | None
    turn_id: str | None
    object_id: str | None
    dialect: str | None
    model: str | None
    status: str | None
    sheet: str | None
    sheet_model: str | None
    currency: str | None
    cash_nano: int
    voucher_nano: int
    held_nano: int
    voucher_id: str | None
    n_fresh: int | None
    n_read: int | None
    n_write: int | None
    n_write_long: int | None
    n_output: int | None
    n_object: int | None
    n_units: int | None
    fresh_nano: int | None
    read_nano: int | None
    write_nano: int | None
    output_nano: int | None
    call_nano: int | None
    creation_nano: int | None
    storage_nano: int | None
    repeated_nano: int | None
    uncached_nano: int | None
    note: str | None


assert Written.__struct_fields__ == tuple(column.name for column in ledger_rows.c)
