"""One run, from its settings to its row: training with what is measured around it, checkpoints, resuming, signals, and what a
person sees. Many runs are `harness.matrix`; whoever watches the run's process is `harness.supervisor`."""
