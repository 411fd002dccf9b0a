"""``python -m harness predict``: what the fp32 runs of a case predict for 16 bits, beside what became of the others."""
