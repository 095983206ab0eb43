"""Import of keys from a file: new keys, and keys whose tokens another system created."""
