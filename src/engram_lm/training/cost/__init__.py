"""What training costs per rank and step, on machines that are not here: counted, then priced by a few public figures.

A `Bill` is arithmetic on a configuration: parameters, FLOPs, bytes of memory by kind, bytes sent. Only two of its
numbers are not counted but modelled: how many distinct rows a batch reads (`DistinctCurve`, measured on text) and the
activations (a sum over the tensors that backward keeps). A `Machine` turns a bill into seconds.

``docs/scaling.md`` has the formulae, what was measured against them and what they say of large machines.

Reading order: ``deduplication.py``, ``shape.py``, ``bill.py``, ``machines.py``.
"""

from engram_lm.training.cost.bill import Bill, TableTraffic, activation_bytes_per_token, bill, muon_parameters
from engram_lm.training.cost.deduplication import CURVES, DistinctCurve, distinct_rows
from engram_lm.training.cost.machines import MACHINES, Machine, Prediction, predict
from engram_lm.training.cost.shape import TrainingShape

__all__ = [
    "CURVES",
    "MACHINES",
    "Bill",
    "DistinctCurve",
    "Machine",
    "Prediction",
    "TableTraffic",
    "TrainingShape",
    "activation_bytes_per_token",
    "bill",
    "distinct_rows",
    "muon_parameters",
    "predict",
]
