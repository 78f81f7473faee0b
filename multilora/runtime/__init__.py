"""Computes what the scheduler decided."""
