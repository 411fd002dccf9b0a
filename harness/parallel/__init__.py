"""One run on several GPUs, a process (a rank) each, started by ``torchrun``.

Every rank runs the same code on the same run: the whole step's batch is made by all, its micro-batches are dealt to
them, gradients are summed, and what was measured is merged at the log points, so that all decide alike. Rank 0 alone
claims, writes and speaks; the others' files go into a folder that vanishes.
"""
