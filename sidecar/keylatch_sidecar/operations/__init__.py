"""What operators run: backup, scanner, doctor."""
