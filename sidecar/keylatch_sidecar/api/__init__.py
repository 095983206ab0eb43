"""The management API: the dialects of unsent and Sendook, and keylatch's extensions."""
