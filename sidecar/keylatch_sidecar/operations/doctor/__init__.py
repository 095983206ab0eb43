"""The checks of `keylatch doctor`: settings, host, store, Redis, listeners. They change nothing."""
