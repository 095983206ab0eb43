"""The commands of `keylatch`, one file per family; `program` puts them together."""
