"""Where a matrix' runs are executed: in processes of this machine (`harness.pool`), or on the nodes of a Ray cluster."""
