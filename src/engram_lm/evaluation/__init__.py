"""How good a model is: its loss on held-out text, benchmarks of lm-evaluation-harness, what rounding a table costs.

Reading order: ``command.py`` (``engram-lm eval``), ``benchmarks.py`` (`run_tasks` and its results),
``harness_model.py`` and ``batching.py`` (how the harness asks a model), ``harness_tasks.py``, ``task_data.py`` and
``suites/`` (which tasks there are, and where their data lies), ``tasks.py`` and ``task_scores.py`` (task files),
``diagnostics/`` (which tokens cost how much), ``recall_questions.py`` and ``recall.py`` (recall against reading), both
with memory switched off by ``suppressing.py``; ``rounding.py``.
"""

from engram_lm.evaluation.benchmarks import BenchmarkResults, Score, TaskResult, check_tasks, run_tasks

__all__ = ["BenchmarkResults", "Score", "TaskResult", "check_tasks", "run_tasks"]
