"""Cache objects of more than one dialect: whose API an object belongs to, and what Gemini's have beside Kimi's.

All objects until here are Kimi's. Lists and the sweep go by dialect, so it comes into their indexes; SQLite then never
reads through an object's messages to find it.
"""

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("cache_objects", sa.Column("dialect", sa.Text, nullable=False, server_default="kimi"))
    op.add_column("cache_objects", sa.Column("tool_choice", sa.LargeBinary))
    op.add_column("cache_objects", sa.Column("early_ns", sa.Integer, nullable=False, server_default="0"))
    op.add_column("cache_objects", sa.Column("updated_at", sa.Integer))
    op.drop_index("cache_objects_tenant_created_at_seq_ix", "cache_objects")
    op.drop_index("cache_objects_status_expires_at_ix", "cache_objects")
    for columns in (["tenant", "dialect", "created_at", "seq"], ["status", "expires_at", "dialect"]):
        op.create_index(f"cache_objects_{'_'.join(columns)}_ix", "cache_objects", columns)
