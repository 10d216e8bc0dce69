"""One script per claim, run as `python -m benchmarks.NAME`; the claim, the peer and the method are in its docstring."""
