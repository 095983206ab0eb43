"""What is asked of the database, and how: the tables, every statement once, and two drivers."""
