"""Revocation: which cached entries are valid, and how a change reaches every process."""
