"""What is remembered of keys: in this process (L1), and in Redis for all of them (L2)."""
