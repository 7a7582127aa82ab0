"""Runs the migrations on the connection that `app.tenancy.database` gives; one process at a time."""

from alembic import context
from sqlalchemy import text

from app.tenancy.tables import Base

LOCK = 0x636D_7830
"""Any number that is ours alone among PostgreSQL's advisory locks."""

connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
else:
    connection.rollback()
    connection.exec_driver_sql("BEGIN IMMEDIATE")
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
context.run_migrations()
