"""The study of rows that are written while a model runs, against a cache of counts."""
