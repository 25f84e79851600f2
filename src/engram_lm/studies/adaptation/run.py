"""All arms and seeds of an adaptation, one after the other, and the result."""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engram_lm.adapt.attachment import adapter_spec
from engram_lm.adapt.decoder import find_decoder
from engram_lm.errors import ConfigError, DataError
from engram_lm.studies.adaptation.arms import ARMS
from engram_lm.studies.adaptation.cost import matched_rank
from engram_lm.studies.adaptation.folder import AdaptationFolder
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmName
from engram_lm.studies.adaptation.text import open_text
from engram_lm.studies.adaptation.trial import ArmCost, Bench
from engram_lm.training.base_model import load_base, lora_targets
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.loop import StepRecord, best_dtype, find_device
from engram_lm.training.progress import RunProgress
from engram_lm.training.run_folder import commit, run_facts

__all__ = ["Adaptation"]


class Adaptation:
    """One ``engram-lm adapt``, in its folder (see `AdaptationFolder`).

    Args:
        recipe: What is asked.
        out: The run folder.
        resume: Whether to go on with the first run that is not finished.
        progress: What people see.
    """

    def __init__(self, recipe: AdaptationRecipe, out: Path, *, resume: bool = False, progress: RunProgress) -> None:
        self.recipe, self.progress = recipe, progress
        self.folder = AdaptationFolder(out, resume=resume)
        self.started = time.time()
        self.commit = commit()

    def prepare(self) -> Bench:
        """Load the base and the text, and work out the geometry of what is added.

        Raises:
            ConfigError: The base cannot be loaded, has no recognizable layer list, or the memory is none for it.
            DataError: There is too little text.
            MismatchError: The base's tokenizer is not the model's.
        """
        recipe, progress = self.recipe, self.progress
        device = find_device(_device(recipe.train.device))
        progress.note(f"loading {recipe.base.model}")
        model, tokenizer = load_base(recipe.base.model, recipe.base.revision, recipe.base.dtype)
        model.to(device).eval()
        decoder = find_decoder(model, recipe.base.layer_list)
        memory = recipe.memory.for_width(decoder.hidden_size)
        if max(memory.layers) >= len(decoder.layers):
            raise ConfigError(
                f"memory.layers {list(memory.layers)}: the base has {len(decoder.layers)} decoder layers, from 0"
            )
        targets = lora_targets(model, recipe.lora.targets, recipe.base.layer_list)
        rank = matched_rank(model, targets, memory) if recipe.lora.rank == "auto" else recipe.lora.rank
        dtype = best_dtype(device) if recipe.train.dtype == "auto" else recipe.train.dtype
        adapter_spec(decoder, tokenizer, memory)  # refuses a tokenizer that is not the model's
        # Last, because it may be many gigabytes.
        with progress.packing() as advance:
            text = open_text(recipe.data, tokenizer, advance)
        if text.about is not None:
            progress.note(text.about)
        return Bench(recipe, model, tokenizer, text, memory, rank, targets, dtype)

    def plan(self, bench: Bench) -> dict[ArmName, tuple[ArmCost, int]]:
        """Say what each arm costs, and how many steps it gets."""
        recipe = self.recipe
        per_step = recipe.train.batch_size * recipe.data.sequence_length
        steps = recipe.train.num_steps
        if steps is None:
            assert recipe.train.epochs is not None
            steps = max(1, round(recipe.train.epochs * bench.text.num_tokens / per_step))
        costs = {name: bench.cost(name) for name in dict.fromkeys(("memory", *recipe.arms.names))}
        budget = steps * per_step * costs["memory"].flops_per_token + costs["memory"].preparation_flops
        plan = {}
        for name in recipe.arms.names:
            cost, own_steps = costs[name], steps
            if recipe.train.equal == "compute" and name != "memory":
                own_steps = round((budget - cost.preparation_flops) / (per_step * cost.flops_per_token))
            if own_steps < 1:
                raise ConfigError(f"the arm {name} cannot take a step of what memory takes {steps} steps of; take more")
            plan[name] = cost, own_steps
        return plan

    def execute(self) -> dict[str, Any]:
        """Do all of it.

        Returns:
            What ``result.json`` holds; ``interrupted`` says whether a signal ended it early.

        Raises:
            RunFolderError: The folder cannot be used.
            MismatchError: The run was begun with another recipe, base or text.
        """
        with self.folder.own(self.recipe):
            bench = self.prepare()
            self.progress.note("measuring the base")
            before = bench.measure_both()
            losses = {text: found["loss"] for text, found in before.items() if found is not None}
            self.folder.check_before({"text": bench.text.digest, "hash": bench.spec_digest()}, losses)
            plan = self.plan(bench)
            runs: dict[ArmName, list[dict[str, Any]]] = {name: [] for name in plan}
            tried: dict[ArmName, list[dict[str, Any]]] = {}
            with Interrupt() as interrupt:
                for name, seed in self._order():
                    if seed == 0:
                        rates = self._rates(name, tried)
                        tried[name] = self._try_rates(bench, name, rates, plan[name][1], interrupt)
                        if len(tried[name]) < len(rates):
                            break
                        run = _best(tried[name])
                    else:
                        rate = _best(tried[name])["lr"]
                        found = self._run_seed(bench, name, seed, rate, plan[name][1], interrupt)
                        if found is None:
                            break
                        run = found
                    runs[name].append(run)
            interrupted = any(len(found) < self.recipe.train.seeds for found in runs.values())
            result = self._result(bench, before, plan, runs, tried, interrupted)
            useful = [name for name in runs if runs[name] and ARMS[name].memory and not ARMS[name].is_control]
            if useful and not interrupted:
                first = runs[useful[0]][0]
                self.folder.publish_adapter(_label(useful[0], first["lr"], several=len(tried[useful[0]]) > 1))
            self.folder.write(result, _render(result))
        return {**result, "out": str(self.folder.path)}

    def _order(self) -> Iterator[tuple[ArmName, int]]:
        """All arms of a seed before the next seed, so that a run that is stopped has compared them."""
        for seed in range(self.recipe.train.seeds):
            # Memory first: others take its rate.
            for name in sorted(self.recipe.arms.names, key=lambda name: name != "memory"):
                yield name, seed

    def _rates(self, name: ArmName, tried: Mapping[ArmName, Sequence[dict[str, Any]]]) -> tuple[float, ...]:
        """The rates that an arm tries. What is the same as memory but for one thing has the same rate, too."""
        arm = ARMS[name]
        if "memory" in tried and (arm.is_control or arm.transfer):
            return (_best(tried["memory"])["lr"],)
        return self.recipe.rates.of(name)

    def _try_rates(
        self, bench: Bench, name: ArmName, rates: Sequence[float], num_steps: int, interrupt: Interrupt
    ) -> list[dict[str, Any]]:
        """Run the first seed with each of some learning rates; fewer where a signal came first."""
        found = []
        if len(rates) > 1 and bench.text.validation is None:
            raise ConfigError(
                f"rates.{name} are several, and data.validation = 0 leaves no text to choose one by; give one rate"
            )
        for rate in rates:
            label = _label(name, rate, several=len(rates) > 1)
            try:
                run = self._run(bench, name, label, 0, rate, num_steps, interrupt, validate=len(rates) > 1)
            except DataError as error:
                if len(rates) == 1:
                    raise
                # A rate that is too high has lost the comparison, and has not ended it.
                self.progress.note(f"learning rate {rate:g}: {error}")
                run = {"seed": 0, "lr": rate, "failed": str(error)}
                self.folder.finish(label, run)
            if run is None:
                break
            found.append(run)
        return found

    def _run_seed(
        self, bench: Bench, name: ArmName, seed: int, rate: float, num_steps: int, interrupt: Interrupt
    ) -> dict[str, Any] | None:
        """Do the run of a later seed. One that diverges is told of in the result, and has not ended the others."""
        label = f"{name}-{seed}"
        try:
            return self._run(bench, name, label, seed, rate, num_steps, interrupt)
        except DataError as error:
            self.progress.note(f"{ARMS[name].title}, seed {seed}: {error}")
            run = {"seed": seed, "lr": rate, "failed": str(error), "domain": None, "retained": None}
            self.folder.finish(label, run)
            return run

    def _run(
        self,
        bench: Bench,
        name: ArmName,
        label: str,
        seed: int,
        rate: float,
        num_steps: int,
        interrupt: Interrupt,
        *,
        validate: bool = False,
    ) -> dict[str, Any] | None:
        """Do one run, or read what it found before; None where a signal came first."""
        done = self.folder.finished(label)
        if done is not None and done["lr"] == rate:  # arms may have been added, and with them another rate chosen
            return done
        if interrupt.asked:
            return None
        arm = ARMS[name]
        self.progress.note(f"{arm.title}, seed {seed}, learning rate {rate:g}")
        with self.progress.training(0, num_steps) as show:

            def on_step(record: StepRecord) -> bool:
                show(record, None)
                return interrupt.asked

            found = bench.run(
                name,
                seed=seed,
                rate=rate,
                num_steps=num_steps,
                save=None if arm.is_control or arm.whole else self.folder.place(label),
                on_step=on_step,
                validate=validate,
            )
        if found is not None:
            if not math.isfinite(found["domain"]["loss"]):
                raise DataError(f"the trained model's loss is {found['domain']['loss']}; lower the learning rate")
            self.folder.finish(label, found)
            self.progress.note(f"{arm.title}, seed {seed}: {_losses(found)}")
        return found

    def _result(
        self,
        bench: Bench,
        before: dict[str, Any],
        plan: Mapping[ArmName, tuple[ArmCost, int]],
        runs: Mapping[ArmName, Sequence[dict[str, Any]]],
        tried: Mapping[ArmName, Sequence[dict[str, Any]]],
        interrupted: bool,
    ) -> dict[str, Any]:
        text, model, recipe = bench.text, bench.model, self.recipe
        decoder = find_decoder(model, recipe.base.layer_list)
        tokens_per_step = recipe.train.batch_size * recipe.data.sequence_length
        arms = {}
        for name, (cost, num_steps) in plan.items():
            trials = tried.get(name, [])
            arms[name] = {
                "title": ARMS[name].title,
                "about": ARMS[name].about,
                **dataclasses.asdict(cost),
                "num_steps": num_steps,
                "num_tokens": num_steps * tokens_per_step,
                "training_flops": cost.preparation_flops + num_steps * tokens_per_step * cost.flops_per_token,
                "lr": runs[name][0]["lr"] if runs[name] else None,
                "rates_tried": [[run["lr"], (run.get("validation") or {}).get("loss")] for run in trials],
                "runs": list(runs[name]),
                "summary": _summary(runs[name], before),
            }
        memory = bench.memory
        return {
            "format": "engram.adaptation.1",
            **run_facts(self.started, self.commit),
            "recipe": recipe.to_dict(),
            "base": {
                "name": recipe.base.model,
                "model_type": str(model.config.model_type),
                "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
                "hidden_size": decoder.hidden_size,
                "num_layers": len(decoder.layers),
            },
            "data": {
                "domain": text.domain_about,
                "domain_tokens": text.num_tokens,
                "held_out_tokens": len(text.held_out.tokens),
                "retained": text.retained_about,
                "retained_tokens": 0 if text.retained is None else len(text.retained.tokens),
                "digest": text.digest,
            },
            "memory": {
                **memory.to_dict(),
                "num_rows": sum(memory.num_table_rows()),
                "table_bytes": memory.table_bytes(4),
                "digest": bench.spec_digest(),
            },
            "dtype": bench.dtype,
            "before": before,
            "arms": arms,
            "interrupted": interrupted,
        }


def _device(name: str) -> str:
    if name != "auto":
        return name
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else str(found)


def _label(name: ArmName, rate: float, *, several: bool) -> str:
    """What the first seed's run of an arm is called in its folder."""
    return f"{name}-0-{rate:g}" if several else f"{name}-0"


def _best(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run with the lowest validation loss, or the only one."""
    good = [run for run in trials if "failed" not in run]
    if not good:
        raise DataError(f"no learning rate of {[run['lr'] for run in trials]} trains: {trials[-1]['failed']}")
    return good[0] if len(good) == 1 else min(good, key=lambda run: run["validation"]["loss"])


def _summary(runs: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for text in ("domain", "retained"):
        losses = [run[text]["loss"] for run in runs if run.get(text) is not None]
        found[f"{text}_mean"] = statistics.fmean(losses) if losses else None
        found[f"{text}_std"] = statistics.stdev(losses) if len(losses) > 1 else None
    retained = found["retained_mean"]
    found["forgetting_mean"] = None if retained is None else retained - before["retained"]["loss"]
    return found


def _losses(run: Mapping[str, Any]) -> str:
    retained = "" if run["retained"] is None else f", {run['retained']['loss']:.3f} on what it knew"
    return f"{run['domain']['loss']:.3f} nats per token on the domain{retained}, {run['seconds']:.0f} s"


def _render(result: dict[str, Any]) -> str:
    from engram_lm.studies.adaptation.report import render_report

    return render_report(result)
