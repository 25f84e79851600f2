"""Which rows a text reads, which N-grams share them, and what lies near them in a table."""
