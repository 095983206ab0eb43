"""Caches of keys: in the process (L1), and in Redis for all processes of a deployment (L2)."""
