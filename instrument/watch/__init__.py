"""Watching a model while it trains: `Watch`, its hooks, the counters on the device and what is read of them."""
