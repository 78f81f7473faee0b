"""Reads the weights of a base model."""
