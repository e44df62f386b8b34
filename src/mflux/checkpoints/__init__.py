"""Weights files in, arrays out."""
