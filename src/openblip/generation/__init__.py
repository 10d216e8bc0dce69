"""Decoding: strategies (`decoding`), search and the ranking of given texts (`search`, `language`)."""
