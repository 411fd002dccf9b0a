"""Re-running a failed step op by op: which op made the first non-finite value, out of what, and why."""
