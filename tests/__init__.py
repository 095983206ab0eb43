"""Tests, in the tree of the source: tests/core for keylatch.core, and so on."""
