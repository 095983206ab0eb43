"""The store: its tables, every SQL statement, and the drivers for SQLite and PostgreSQL."""
