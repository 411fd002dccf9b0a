"""How a run is executed: the command line, one run, many runs, their processes, and what is asked of their results.

What may live here: settings and options, the training step and its precision, and a package or module for each command;
no measuring that a loop of somebody else could use (`instrument`), no figure (`report`). Importing this package imports no
torch: `--help` must be instant.
"""
