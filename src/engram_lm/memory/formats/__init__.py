"""Published formats of memory: one file for each family, ``checkpoint.py`` reads and writes all of them."""
