"""Runs the migrations on the store's connection, in its transaction."""

from alembic import context

from keylatch.storage.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="keylatch_version",
)
context.run_migrations()
