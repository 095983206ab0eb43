"""The store: its tables, every SQL statement, and the databases SQLite and PostgreSQL."""
