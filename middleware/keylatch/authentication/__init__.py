"""Authentication: from a token to a decision; cache, look-up, hash."""
