"""``python -m harness diff``: where two runs part, and what each costs. Reads records; runs nothing."""
