"""Telemetry of one process: events, counters, health and traces; `metrics` and `logs` export it."""
