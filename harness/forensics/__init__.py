"""Why a run failed: the failed step again, op by op, and what is kept of it."""
