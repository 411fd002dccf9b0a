"""Why a run failed: its failed step replayed, in the run or from what it stored. How a replay finds the op is
`instrument.replay`; what is shown of it, and what one change would have done, is `harness.inspect`.
"""
