"""Decides what each step computes. No torch."""
