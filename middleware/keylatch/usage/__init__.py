"""Usage of keys: recorded by checks, and stored by a background task."""
