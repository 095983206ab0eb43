"""The work of the commands for operators: backup and restore, scan, doctor."""
