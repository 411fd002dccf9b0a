"""``python -m harness bench reliability``: faults injected on purpose, and what is lost by them."""
