"""Does memory help on this text? A small model with memory against its twin without, on one machine, in minutes.

Reading order: ``summary.py`` (the result as a table), ``report.py`` (the result as a page that opens offline).
"""
