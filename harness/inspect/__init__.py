"""``python -m harness inspect``: what a run's files say about its end, in characters or as a script. Reads; runs no step."""
