"""Creates, lists, changes and deletes keys, and rotates the store's own secrets."""
