"""The tables of the database. What their rows mean is in the modules that read them.

Amounts of money are integers of 10⁻⁹ of a currency's unit, in columns that end in `_nano`; times are unix seconds.
"""

import sqlalchemy as sa

METADATA = sa.MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_ix",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fk",
        "pk": "%(table_name)s_pk",
    }
)

# Sums of money, times and sizes outgrow 32 bits; SQLite numbers rows by itself only where the type is INTEGER.
BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")

api_keys = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column(
        "digest", sa.LargeBinary, nullable=False, unique=True
    ),  # of the whole key; the key itself is never stored
    sa.Column("last4", sa.Text, nullable=False),
    sa.Column("created_at", BIG, nullable=False),
    sa.Column("revoked_at", BIG),
    sa.Column("project", sa.Text, nullable=False, server_default="default"),
    sa.Column("role", sa.Text, nullable=False, server_default="member"),  # a Role
    sa.Column("expires_at", BIG),
    sa.Column("models", sa.LargeBinary),  # JSON list of the models it may use; NULL: all
)
sa.Index(  # a revoked key's name may be given to its successor
    "api_keys_live_name_ix",
    api_keys.c.organisation,
    api_keys.c.name,
    unique=True,
    sqlite_where=api_keys.c.revoked_at.is_(None),
    postgresql_where=api_keys.c.revoked_at.is_(None),
)

cache_objects = sa.Table(
    "cache_objects",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),  # order of creation within a second
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("created_at", BIG, nullable=False),
    sa.Column("expires_at", BIG, nullable=False),
    sa.Column("n_tokens", sa.Integer, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("metadata", sa.LargeBinary),  # JSON, pairs in the client's order; NULL is unset, which is not empty
    sa.Column("error", sa.Text),
    # The big columns last: SQLite reads a row's pages from the front.
    sa.Column("tools", sa.LargeBinary, nullable=False),
    sa.Column("messages", sa.LargeBinary, nullable=False),
    # Added later, so they stand behind the big ones; no scan over many rows reads them: dialect is in the indexes.
    sa.Column("dialect", sa.Text, nullable=False, server_default="kimi"),
    sa.Column("tool_choice", sa.LargeBinary),  # JSON; NULL: the model chooses
    sa.Column("early_ns", sa.Integer, nullable=False, server_default="0"),
    sa.Column("updated_at", BIG),
    sa.Column("project", sa.Text),  # who pays, with the key; NULL: made with --dev, or before there was a ledger
    sa.Column("key_id", sa.Integer),
    sa.UniqueConstraint("tenant", "id"),  # what cache_tags refers to
    sa.Index("cache_objects_tenant_dialect_created_at_seq_ix", "tenant", "dialect", "created_at", "seq"),
    sa.Index("cache_objects_status_expires_at_dialect_ix", "status", "expires_at", "dialect"),
    sqlite_autoincrement=True,
)

cache_tags = sa.Table(
    "cache_tags",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("tag", sa.Text, nullable=False),
    sa.Column("object_id", sa.Text, nullable=False),
    sa.Column("created_at", BIG, nullable=False),
    sa.UniqueConstraint("tenant", "tag"),
    # The tenant is part of the reference, so a tag cannot point at another tenant's object.
    sa.ForeignKeyConstraint(["tenant", "object_id"], [cache_objects.c.tenant, cache_objects.c.id], ondelete="CASCADE"),
    sa.Index("cache_tags_tenant_created_at_seq_ix", "tenant", "created_at", "seq"),
    sa.Index("cache_tags_tenant_object_id_ix", "tenant", "object_id"),
    sqlite_autoincrement=True,
)

breakpoints = sa.Table(
    "breakpoints",
    METADATA,
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),  # of the prefix's tokens and all its state depends on
    sa.Column("n_tokens", sa.Integer, nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("ttl_s", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.PrimaryKeyConstraint("tenant", "digest"),
    sa.Index("breakpoints_expires_at_ix", "expires_at"),
)

files = sa.Table(
    "files",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),  # order of creation
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("dialect", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False, unique=True),  # its name on disk
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("media_type", sa.Text, nullable=False),
    sa.Column("n_bytes", BIG, nullable=False),
    sa.Column("sha256", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),  # NULL: never
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("error", sa.Text),
    sa.UniqueConstraint("tenant", "id"),
    sa.Index("files_tenant_dialect_seq_ix", "tenant", "dialect", "seq"),
    sa.Index("files_expires_at_ix", "expires_at"),
    sqlite_autoincrement=True,
)

organisations = sa.Table(
    "organisations",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column(
        "id", sa.Text, nullable=False, unique=True
    ),  # chosen by the operator, never changed: what is cached hangs on it
    sa.Column("tier", sa.Text),  # the preset its limits come from; NULL: the configured default
    sa.Column("limits", sa.LargeBinary),  # JSON: single limits that differ from the tier's
    sa.Column("is_prepaid", sa.Boolean, nullable=False),  # a turn is refused when the balance does not cover its hold
    sa.Column("cache_scope", sa.Text, nullable=False),  # "organisation" or "project": who shares what is cached
    sa.Column("created_at", BIG, nullable=False),
    sa.Column("disabled_at", BIG),
    sqlite_autoincrement=True,
)

projects = sa.Table(
    "projects",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("organisation", sa.Text, sa.ForeignKey(organisations.c.id), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created_at", BIG, nullable=False),
    sa.Column("archived_at", BIG),
    sa.UniqueConstraint("organisation", "name"),
    sqlite_autoincrement=True,
)

# The ledger. Rows are only ever added; the tables after it are sums over them, kept so that a hold need not add up rows.
ledger_rows = sa.Table(
    "ledger_rows",
    METADATA,
    sa.Column("seq", BIG, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),  # "TURN/hold", "TURN/settle": the same act twice is one row
    sa.Column("kind", sa.Text, nullable=False),  # a RowKind
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column("project", sa.Text),
    sa.Column("key_id", sa.Integer),
    sa.Column("turn_id", sa.Text),
    sa.Column("object_id", sa.Text),
    sa.Column("dialect", sa.Text),
    sa.Column("model", sa.Text),
    sa.Column("status", sa.Text),  # how the turn ended: "finished" or an ErrorKind
    sa.Column("sheet", sa.Text),  # "NAME@VERSION" of the prices used; NULL: the model has no prices
    sa.Column("sheet_model", sa.Text),
    sa.Column("currency", sa.Text),
    # What the row changes.
    sa.Column("cash_nano", BIG, nullable=False),
    sa.Column("voucher_nano", BIG, nullable=False),
    sa.Column("held_nano", BIG, nullable=False),
    sa.Column("voucher_id", sa.Text),  # of a grant
    # What was used, in tokens as the engine counted them; NULL: not a row of use.
    sa.Column("n_fresh", BIG),
    sa.Column("n_read", BIG),
    sa.Column("n_write", BIG),  # the part below included
    sa.Column("n_write_long", BIG),
    sa.Column("n_output", BIG),
    sa.Column("n_object", BIG),  # of n_read, read from a cache object; for creation and storage its length
    sa.Column("n_units", BIG),  # of storage: seconds of its life paid with this row
    # What that costs, by class; the sum is what the row takes from vouchers and cash.
    sa.Column("fresh_nano", BIG),
    sa.Column("read_nano", BIG),
    sa.Column("write_nano", BIG),
    sa.Column("output_nano", BIG),
    sa.Column("call_nano", BIG),
    sa.Column("creation_nano", BIG),
    sa.Column("storage_nano", BIG),
    sa.Column(
        "repeated_nano", BIG
    ),  # not charged, since an attempt with the same Idempotency-Key has paid it: negative
    sa.Column("uncached_nano", BIG),  # the same use without caching
    sa.Column("note", sa.Text),
    sa.Index("ledger_rows_organisation_at_ix", "organisation", "at"),
    sa.Index("ledger_rows_turn_id_ix", "turn_id"),
    sqlite_autoincrement=True,
)

accounts = sa.Table(
    "accounts",
    METADATA,
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("cash_nano", BIG, nullable=False),
    sa.Column("voucher_nano", BIG, nullable=False),
    sa.Column("held_nano", BIG, nullable=False),
    sa.PrimaryKeyConstraint("organisation", "currency"),
)

vouchers = sa.Table(
    "vouchers",
    METADATA,
    sa.Column("id", sa.Text, nullable=False, primary_key=True),
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("granted_nano", BIG, nullable=False),
    sa.Column("left_nano", BIG, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Index("vouchers_organisation_currency_ix", "organisation", "currency"),
)

holds = sa.Table(  # the open ones
    "holds",
    METADATA,
    sa.Column("turn_id", sa.Text, nullable=False, primary_key=True),
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("key_id", sa.Integer),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("amount_nano", BIG, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
    sa.Index("holds_expires_at_ix", "expires_at"),
    sa.Index("holds_organisation_ix", "organisation"),
)

budgets = sa.Table(
    "budgets",
    METADATA,
    sa.Column("scope", sa.Text, nullable=False),  # "org:ORG", "project:ORG/NAME", "key:ID"
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("period", sa.Text, nullable=False),  # "day", "month" (both UTC) or "total"
    sa.Column("soft_nano", BIG),
    sa.Column("hard_nano", BIG),
    sa.PrimaryKeyConstraint("scope", "currency", "period"),
    sa.Index("budgets_organisation_ix", "organisation"),
)

# What has been charged in a budget's periods, from the one on in which it was set. What is held is the sum of open holds,
# whenever they began: each of them may be settled in any period that begins before it is closed.
spending = sa.Table(
    "spending",
    METADATA,
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("period", sa.Text, nullable=False),
    sa.Column("period_start", BIG, nullable=False),  # unix seconds; 0 for "total"
    sa.Column("spent_nano", BIG, nullable=False),
    sa.PrimaryKeyConstraint("scope", "currency", "period", "period_start"),
)

storage_meters = sa.Table(  # one per life of a cache object: from when it is ready until it expires or is deleted
    "storage_meters",
    METADATA,
    sa.Column("id", sa.Text, nullable=False, primary_key=True),  # "OBJECT/began_at"
    sa.Column("object_id", sa.Text, nullable=False),
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column("project", sa.Text),
    sa.Column("key_id", sa.Integer),
    sa.Column("dialect", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("sheet", sa.Text),
    sa.Column("sheet_model", sa.Text),
    sa.Column("currency", sa.Text),
    sa.Column("n_tokens", BIG, nullable=False),
    sa.Column("began_at", sa.Float, nullable=False),
    sa.Column("ends_at", sa.Float, nullable=False),  # when the object expires, or when it was deleted
    sa.Column("charged_until", sa.Float, nullable=False),
    sa.Column("charged_nano", BIG, nullable=False),
    sa.Column("is_closed", sa.Boolean, nullable=False),
    sa.Index("storage_meters_is_closed_object_id_ix", "is_closed", "object_id"),
)

repeats = sa.Table(  # requests that carried an Idempotency-Key
    "repeats",
    METADATA,
    sa.Column("organisation", sa.Text, nullable=False),
    sa.Column("key_digest", sa.LargeBinary, nullable=False),
    sa.Column("body_digest", sa.LargeBinary, nullable=False),
    sa.Column("turn_id", sa.Text, nullable=False),  # of the attempt that is running or was the last
    sa.Column("n_attempts", sa.Integer, nullable=False),
    sa.Column("charged_nano", BIG, nullable=False),  # by all attempts together
    sa.Column("currency", sa.Text),  # of that; NULL: nothing has been charged
    sa.Column("at", sa.Float, nullable=False),
    sa.PrimaryKeyConstraint("organisation", "key_digest"),
    sa.Index("repeats_at_ix", "at"),
)
