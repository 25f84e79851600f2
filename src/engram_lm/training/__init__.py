"""Text on disk → trained weights.

Reading order: ``data/`` (text → batches of tokens); ``loss.py`` (what is trained), ``distribution.py`` and
``shard_tables.py`` (several processes as one), ``optimizers/`` and ``schedules.py`` (gradients → updates), ``loop.py``
(steps), ``diagnostics.py``, ``held_out.py`` and ``peak.py`` (what is measured); ``checkpoints/`` (files that any number
of processes reads), ``export.py`` (a Hugging Face folder of one). Around it: ``recipe_file.py`` and ``recipe.py`` (what
decides a run), ``assembly.py``, ``build.py`` and ``base_model.py`` (its parts made real), ``metrics.py``,
``progress.py``, ``interrupts.py`` and ``run_folder.py`` (what a run tells, when it stops and what it leaves),
``job.py`` and ``run.py`` (the run), ``command.py`` (``engram-lm train``); ``flops.py`` and ``dry_run.py`` (what it
would cost). For trainers of others: ``huggingface.py``, and ``table_gradients.py`` (tables under
DistributedDataParallel).
"""
