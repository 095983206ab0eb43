"""The calls that manage keys: two dialects of others, and keylatch's own extensions."""
