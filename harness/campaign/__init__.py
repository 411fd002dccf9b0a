"""``python -m harness campaign``: everything that there is to measure on a GPU, in one command that may be cut at any moment.

Every stage is a process of its own, so that a crash costs only itself; ``campaign.json`` says what was planned, what is
done and what it took. The same command resumes.
"""
