"""``python -m harness campaign``: everything there is to measure on a GPU, in one command that may be cut at any moment."""
