"""Decoding: strategies (`decoding`), the loop (`generate`), ranking of given texts (`ranking`)."""
