"""Other programs' logs in: each importer writes an ordinary results folder, marked IMPORTED."""
