"""``python -m harness inspect``: what a run's files say about its end, in characters or as a script; with ``--try`` its failed
step once more with one thing changed.
"""
