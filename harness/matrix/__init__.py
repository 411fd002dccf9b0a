"""``python -m harness matrix``: many runs. What is planned, shared among machines, afforded, executed here or on a Ray cluster,
and shown meanwhile. What one run is belongs to `harness.run`, its process to `harness.supervisor`."""
