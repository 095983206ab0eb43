"""The pure decisions: no I/O, no clock, no lock."""
