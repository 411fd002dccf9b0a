"""Uncertainty, in closed form where there is one. Every function names its method and its limits."""
