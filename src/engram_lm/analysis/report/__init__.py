"""The page of an analysis: what a person would rather look at than read numbers."""
