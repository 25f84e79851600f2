"""Whole questions asked of memory: train several models under one budget, compare them, show what came out."""
