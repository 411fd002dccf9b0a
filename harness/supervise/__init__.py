"""One run's death is one row: each run in a process of its own, watched from another one.

The run tells where it is (`pulse`); whoever watches it (`vigil`) stops one that hangs; a run that left no row
gets one (`burial`) that says what killed it (`death`), from what there is to know about it (`evidence`).
"""
