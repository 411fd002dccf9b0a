"""Why a run failed: its failed step replayed from what the run stored, and again with one thing changed. How a replay finds
the op is `instrument.replay`; what is shown of it is `harness.inspect`.
"""
