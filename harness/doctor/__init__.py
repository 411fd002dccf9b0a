"""``python -m harness doctor``: what this machine can do, found by trying it, and the rates that it reaches."""
