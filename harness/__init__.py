"""How a run is executed. Importing this package imports no torch: `--help` must be instant."""
