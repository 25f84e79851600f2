"""Weights → text."""
