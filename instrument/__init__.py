"""How things are measured. Importing this package imports no torch (the report reads records)."""
