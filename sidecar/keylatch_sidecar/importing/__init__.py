"""Many keys at once, from a file: new ones, and ones that were made elsewhere."""
