"""The database's revisions, in versions/. Applied by `keepwarm.storage` at every start; nobody runs Alembic by hand."""
