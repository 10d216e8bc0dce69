"""Metrics as plain functions over numpy arrays and strings. No torch."""
