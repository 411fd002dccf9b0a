"""``python -m harness fit``: the largest batch that a configuration can train with on this GPU, and what tokens cost there.

People rent memory, and choose a configuration at the batch that fills it, not at 32.
"""
