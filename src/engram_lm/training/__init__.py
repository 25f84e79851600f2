"""Text on disk → trained weights.

Reading order: ``data/`` (text → batches of tokens); ``loss.py`` (what is trained),
``compilation.py`` (the same, compiled), ``distribution.py`` and
``shard_tables.py`` (several processes as one), ``optimizers/`` and ``schedules.py`` (gradients → updates), ``loop.py``
(steps), ``writing.py`` (which rows are trained), ``retention.py`` and ``dependence.py`` (losses that compare a model
with its base), ``diagnostics.py``, ``held_out.py`` and ``flops.py`` (what is measured); ``checkpoints/`` (files that
any number of processes reads), ``export.py`` (the model in one of them as a Hugging Face folder).

Around it: ``recipe_file.py`` and ``recipe.py`` (what decides a run); ``assembly.py``, ``build.py`` and
``base_model.py`` (its text and its model); ``metrics.py``, ``progress.py``, ``interrupts.py`` and ``run_folder.py``
(what a run reports, when it stops, what it leaves); ``recipe_trainer.py``, ``job.py`` and ``run.py`` (the run);
``dry_run.py`` (what it would cost); ``command.py`` (``engram-lm train``). For trainers of Hugging Face:
``huggingface.py``, ``trainer_losses.py`` and ``trainer_checkpoints.py`` (its losses and its checkpoints),
``table_gradients.py`` (tables under DistributedDataParallel).
"""
