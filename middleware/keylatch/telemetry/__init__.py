"""What a process tells of itself, gathered where it happens; `metrics` and `logs` show it."""
