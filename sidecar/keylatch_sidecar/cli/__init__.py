"""The commands of `keylatch`, a file for each family of them; `cli` puts them together."""
