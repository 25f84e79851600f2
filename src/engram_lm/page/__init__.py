"""Findings → a page: the frame that every report stands in, its figures, and numbers as people read them."""
