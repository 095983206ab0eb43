"""Runs the migrations on the connection that `keylatch.store` hands over, in its transaction."""

from alembic import context

from keylatch.sql.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="keylatch_version",
)
context.run_migrations()
