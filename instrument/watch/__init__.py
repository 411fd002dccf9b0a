"""Watching a model while it trains."""
