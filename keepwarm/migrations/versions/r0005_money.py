"""Organisations and projects; the ledger, and the sums kept beside it. What a key called its tenant is its organisation.

Every tenant becomes an organisation of the same id, so what is cached for it stays its own. The first revision that
runs on PostgreSQL in earnest: times and sizes of the tables before it get 64 bits there, which they always had on SQLite.
"""

import sqlalchemy as sa
from alembic import op

revision = "r0005"
down_revision = "r0004"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")


# Times in whole seconds outgrow 32 bits in 2038, and clients may name later ones now.
WIDER = {
    "api_keys": ("created_at", "revoked_at"),
    "cache_objects": ("created_at", "expires_at", "updated_at"),
    "cache_tags": ("created_at",),
    "files": ("n_bytes",),
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table, columns in WIDER.items():
            for column in columns:
                op.alter_column(table, column, type_=sa.BigInteger)
    op.add_column("cache_objects", sa.Column("project", sa.Text))
    op.add_column("cache_objects", sa.Column("key_id", sa.Integer))
    _keys()
    _identities()
    _ledger()
    _sums()
    _meters()


def _identities() -> None:
    op.create_table(
        "organisations",
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tier", sa.Text),
        sa.Column("limits", sa.LargeBinary),
        sa.Column("is_prepaid", sa.Boolean, nullable=False),
        sa.Column("cache_scope", sa.Text, nullable=False),
        sa.Column("created_at", BIG, nullable=False),
        sa.Column("disabled_at", BIG),
        sa.PrimaryKeyConstraint("seq", name="organisations_pk"),
        sa.UniqueConstraint("id", name="organisations_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "projects",
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created_at", BIG, nullable=False),
        sa.Column("archived_at", BIG),
        sa.PrimaryKeyConstraint("seq", name="projects_pk"),
        sa.ForeignKeyConstraint(["organisation"], ["organisations.id"], name="projects_organisation_fk"),
        sa.UniqueConstraint("organisation", "name", name="projects_organisation_name_key"),
        sqlite_autoincrement=True,
    )

    op.execute(  # the keys' tenants
        "INSERT INTO organisations (id, is_prepaid, cache_scope, created_at) "
        "SELECT organisation, false, 'organisation', min(created_at) FROM api_keys GROUP BY organisation"
    )
    op.execute(
        "INSERT INTO projects (organisation, name, created_at) SELECT id, 'default', created_at FROM organisations"
    )


def _ledger() -> None:
    op.create_table(
        "ledger_rows",
        sa.Column("seq", BIG, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("project", sa.Text),
        sa.Column("key_id", sa.Integer),
        sa.Column("turn_id", sa.Text),
        sa.Column("object_id", sa.Text),
        sa.Column("dialect", sa.Text),
        sa.Column("model", sa.Text),
        sa.Column("status", sa.Text),
        sa.Column("sheet", sa.Text),
        sa.Column("sheet_model", sa.Text),
        sa.Column("currency", sa.Text),
        sa.Column("cash_nano", BIG, nullable=False),
        sa.Column("voucher_nano", BIG, nullable=False),
        sa.Column("held_nano", BIG, nullable=False),
        sa.Column("voucher_id", sa.Text),
        sa.Column("n_fresh", BIG),
        sa.Column("n_read", BIG),
        sa.Column("n_write", BIG),
        sa.Column("n_write_long", BIG),
        sa.Column("n_output", BIG),
        sa.Column("n_object", BIG),
        sa.Column("n_units", BIG),
        sa.Column("fresh_nano", BIG),
        sa.Column("read_nano", BIG),
        sa.Column("write_nano", BIG),
        sa.Column("output_nano", BIG),
        sa.Column("call_nano", BIG),
        sa.Column("creation_nano", BIG),
        sa.Column("storage_nano", BIG),
        sa.Column("repeated_nano", BIG),
        sa.Column("uncached_nano", BIG),
        sa.Column("note", sa.Text),
        sa.PrimaryKeyConstraint("seq", name="ledger_rows_pk"),
        sa.UniqueConstraint("id", name="ledger_rows_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ledger_rows_organisation_at_ix", "ledger_rows", ["organisation", "at"])
    op.create_index("ledger_rows_turn_id_ix", "ledger_rows", ["turn_id"])


def _sums() -> None:
    op.create_table(
        "accounts",
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("cash_nano", BIG, nullable=False),
        sa.Column("voucher_nano", BIG, nullable=False),
        sa.Column("held_nano", BIG, nullable=False),
        sa.PrimaryKeyConstraint("organisation", "currency", name="accounts_pk"),
    )
    op.create_table(
        "vouchers",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("granted_nano", BIG, nullable=False),
        sa.Column("left_nano", BIG, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.PrimaryKeyConstraint("id", name="vouchers_pk"),
    )
    op.create_index("vouchers_organisation_currency_ix", "vouchers", ["organisation", "currency"])
    op.create_table(
        "holds",
        sa.Column("turn_id", sa.Text, nullable=False),
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("project", sa.Text, nullable=False),
        sa.Column("key_id", sa.Integer),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("amount_nano", BIG, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("turn_id", name="holds_pk"),
    )
    op.create_index("holds_expires_at_ix", "holds", ["expires_at"])
    op.create_index("holds_organisation_ix", "holds", ["organisation"])
    op.create_table(
        "budgets",
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("period", sa.Text, nullable=False),
        sa.Column("soft_nano", BIG),
        sa.Column("hard_nano", BIG),
        sa.PrimaryKeyConstraint("scope", "currency", "period", name="budgets_pk"),
    )
    op.create_index("budgets_organisation_ix", "budgets", ["organisation"])
    op.create_table(
        "spending",
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("currency", sa.Text, nullable=False),
        sa.Column("period", sa.Text, nullable=False),
        sa.Column("period_start", BIG, nullable=False),
        sa.Column("spent_nano", BIG, nullable=False),
        sa.PrimaryKeyConstraint("scope", "currency", "period", "period_start", name="spending_pk"),
    )


def _meters() -> None:
    op.create_table(
        "storage_meters",
        sa.Column("id", sa.Text, nullable=False),
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
        sa.Column("ends_at", sa.Float, nullable=False),
        sa.Column("charged_until", sa.Float, nullable=False),
        sa.Column("charged_nano", BIG, nullable=False),
        sa.Column("is_closed", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="storage_meters_pk"),
    )
    op.create_index("storage_meters_is_closed_object_id_ix", "storage_meters", ["is_closed", "object_id"])
    op.create_table(
        "repeats",
        sa.Column("organisation", sa.Text, nullable=False),
        sa.Column("key_digest", sa.LargeBinary, nullable=False),
        sa.Column("body_digest", sa.LargeBinary, nullable=False),
        sa.Column("turn_id", sa.Text, nullable=False),
        sa.Column("n_attempts", sa.Integer, nullable=False),
        sa.Column("charged_nano", BIG, nullable=False),
        sa.Column("currency", sa.Text),
        sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("organisation", "key_digest", name="repeats_pk"),
    )
    op.create_index("repeats_at_ix", "repeats", ["at"])


def _keys() -> None:
    with op.batch_alter_table("api_keys") as keys:
        keys.drop_index("api_keys_live_name_ix")
        keys.alter_column("tenant", new_column_name="organisation")
        keys.add_column(sa.Column("project", sa.Text, nullable=False, server_default="default"))
        keys.add_column(sa.Column("role", sa.Text, nullable=False, server_default="member"))
        keys.add_column(sa.Column("expires_at", BIG))
        keys.add_column(sa.Column("models", sa.LargeBinary))
    op.create_index(
        "api_keys_live_name_ix",
        "api_keys",
        ["organisation", "name"],
        unique=True,
        sqlite_where=sa.text("revoked_at IS NULL"),
        postgresql_where=sa.text("revoked_at IS NULL"),
    )
