"""Plots A to H: one file each, a table in, a figure out. Nothing is computed here but the picture."""
