"""One run on several GPUs, a process (a rank) each, started by ``torchrun``.

Every rank runs the same code on the same run: all make the whole step's batch, each runs its micro-batches of it, gradients are
summed, and measurements are merged at the log points, so that all decide alike. Rank 0 alone claims the run, writes and prints;
the others' files go into a temporary folder.
"""
