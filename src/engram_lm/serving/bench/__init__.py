"""What reading tables costs: rows per second by tier (``tables.py``), and what a cache would save (``simulate.py``)."""
