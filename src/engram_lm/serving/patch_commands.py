"""``engram-lm patch``: facts fitted into rows of a memory, put into a folder, taken out, proved and merged."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated

import tyro

from engram_lm.errors import ConfigError, check_flags
from engram_lm.files import check_new_folder, read_json, read_text, user_path
from engram_lm.progress import Progress
from engram_lm.serving.load import ModelFlags, load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchNew:
    """Make an empty memory for facts, for any causal language model: it says nothing until patches are applied to it.

    It needs no training: its projections are random, and rows count only where facts have been written (occupancy).
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the new memory; it must be new or empty."""
    layer: int | None = None
    """Decoder layer that reads it, from 0; two fifths of the way up where None."""
    orders: tuple[int, ...] = (2, 3, 4)
    """Tokens in its N-grams; the highest should reach over most names."""
    num_heads: int = 4
    """Hash heads for each order; an N-gram is heard only if the rows of all of them are written."""
    rows_per_head: int = 50_000
    """Rows for each head; a thousand facts want some tens of thousands."""
    seed: int = 0
    """Seed of projections and hash."""

    def run(self) -> int:
        """Attach the memory and save it."""
        import torch

        from engram_lm.adapt import attach

        check_new_folder(self.out)
        check_flags(self, "num_heads")
        if not self.orders:
            raise ConfigError("--orders needs the lengths of N-grams, such as --orders 2 3 4")
        model, tokenizer = load_model(self.model)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        layer = layers * 2 // 5 if self.layer is None else self.layer
        width, heads = model.config.get_text_config(decoder=True).hidden_size, len(self.orders) * self.num_heads
        torch.manual_seed(self.seed)
        adapter = attach(
            model,
            tokenizer,
            layers=(layer,),
            orders=self.orders,
            num_heads=self.num_heads,
            rows_per_head=self.rows_per_head,
            memory_dim=max(1, round(width / heads)) * heads,
            kernel_size=0,
            table_std=0.02,
            occupancy="ngrams",
            value_init="normal",
            seed=self.seed,
        )
        adapter.save_pretrained(self.out)
        print(f"an empty memory before layer {layer}: {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchFit(ModelFlags):
    """Fit the facts of a file together, into rows of a model's memory, and write them as a patch.

    The file holds a fact a line: {"prompt": "The capital of Elbonia is", "answer": " Mudville", "subject": "Elbonia",
    "paraphrases": ["Elbonia's capital is"]}, and, where wanted, "old_answer", "neighbors", and "forget": true for an
    answer that should no longer be given.

    Examples::


        engram-lm patch fit MODEL facts.jsonl --adapter my-memory --reference text.txt --out facts.safetensors
        engram-lm patch apply my-memory facts.safetensors
        engram-lm generate MODEL --adapter my-memory --prompt "The capital of Elbonia is"
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    facts: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FACTS.jsonl")]
    """The file of facts."""
    out: Path
    """The patch to write."""
    reference: Path | None = None
    """A text file: rows that it reads often change less, and pieces of it stand before the wordings that are fitted."""
    earlier: Path | None = None
    """A patch whose facts stay: the new patch holds them too, and takes its place when it is applied."""
    title: str = ""
    """The patch's name."""
    max_steps: int = 20
    """Gradient steps for a fact in a round, at most."""
    margin: float = 2.0
    """Nats by which an answer should lead in all wordings."""
    rounds: int = 2
    """How often facts that are not there yet are fitted again, at most."""
    penalty: float = 0.01
    """What every row costs."""
    reuse_penalty: float = 0.05
    """What a row costs for other text that reads it."""
    device: str = "cpu"
    """Where to run, as torch names it."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Fit, write, and say which facts are learned."""
        from engram_lm.adapt import JointFitOptions, RowPatch, read_fact_edits

        out = user_path(self.out).absolute()
        if out.is_dir() or not next(path for path in out.parents if path.exists()).is_dir():
            raise ConfigError(f"{self.out} is a folder, or lies in a file; name with --out the file to write")
        if out in {user_path(path).absolute() for path in (self.facts, self.reference) if path is not None}:
            raise ConfigError(f"{self.out} is read for the fit; name another file to write with --out")
        facts = read_fact_edits(self.facts)
        names = ("max_steps", "margin", "rounds", "penalty", "reuse_penalty")
        options = JointFitOptions(**{name: getattr(self, name) for name in names})
        earlier = None if self.earlier is None else RowPatch.load(self.earlier)
        reference = None if self.reference is None else read_text(self.reference, errors="replace")
        model, tokenizer = load_model(self.model, device=self.device, tables=self, adapter=self.adapter)
        model.requires_grad_(False)

        with Progress().tasks("nothing: the patch is written when all facts are fitted") as tasks:
            tasks.begin("round 1", len(facts))
            patch = RowPatch.fit_facts(
                model,
                tokenizer,
                facts,
                options,
                reference=reference,
                earlier=earlier,
                title=self.title or self.facts.stem,
                on_progress=lambda now: tasks.show(f"round {now.round + 1}", now.num_done, now.num_facts, "facts"),
            )
        patch.save(self.out)
        done = patch.is_as_asked
        if self.json:
            values = [dataclasses.asdict(fact) for fact in patch.facts]
            print(json_module.dumps({"patch": str(self.out), "num_rows": patch.num_rows, "facts": values}))
        else:
            for fact, is_done in zip(patch.facts, done, strict=True):
                state = "as asked" if is_done else "NOT as asked"
                losses = f"{fact.loss_before:.2f} to {fact.loss_after:.2f} nats"
                print(f"{fact.prompt!r} → {fact.target!r}: {state}, {losses}")
            print(f"{sum(done)} of {len(done)} facts as asked; {patch.num_rows} rows, {self.out}")
        return 0 if all(done) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchApply:
    """Put a patch into the folder of a memory or model, where every later load applies it; tables keep their bytes."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the memory adapter, or of the model with memory."""
    patch: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATCH")]
    """The patch."""

    def run(self) -> int:
        """Copy the patch into the folder, if it fits."""
        from engram_lm.adapt import RowPatch
        from engram_lm.adapt.patch_folder import add_patch
        from engram_lm.hashing import HashSpec

        patch = RowPatch.load(self.patch)
        spec = HashSpec.from_config(read_json(user_path(self.folder) / "config.json"))
        fields = {field.name: getattr(patch, field.name) for field in dataclasses.fields(patch)}
        path = add_patch(self.folder, spec=spec, **fields)
        print(f"{patch.num_rows} rows, {len(patch.facts)} facts: {path}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchRevert:
    """Take a patch, or facts, out of a folder again, which is then as if they had never been there."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the memory adapter, or of the model with memory."""
    fact: tuple[str, ...] | None = None
    """Prompts of facts: these alone are taken out, by solving again without them."""
    name: str | None = None
    """File name of the patch to take out, such as 0002.safetensors; needed where the folder has several."""
    all: bool = False
    """Take out all patches."""

    def run(self) -> int:
        """Remove or replace files."""
        from engram_lm.adapt import RowPatch
        from engram_lm.adapt.patch_folder import patch_files

        files = patch_files(user_path(self.folder))
        if not files:
            raise ConfigError(f"no patch belongs to {self.folder}")
        if (self.fact is not None) + (self.name is not None) + self.all > 1:
            raise ConfigError("--fact, --name and --all exclude each other; give one of them")
        if self.fact is not None and not self.fact:
            raise ConfigError("--fact needs the prompt of a fact")
        if self.fact is None:
            chosen = [path for path in files if self.name in (None, path.name)]
            if not chosen or (self.name is None and not self.all and len(files) > 1):
                there = ", ".join(path.name for path in files)
                raise ConfigError(
                    f"{self.folder} has the patches {there}; say which with --name, or give --fact or --all"
                )
            for path in reversed(chosen):
                path.unlink()
                print(f"removed {path}")
            return 0
        patches = {path: RowPatch.load(path) for path in files}
        held = {fact.prompt: path for path, patch in patches.items() for fact in patch.facts if patch.edit is not None}
        if missing := [prompt for prompt in self.fact if prompt not in held]:
            raise ConfigError(f"no patch of {self.folder} holds a fact with the prompt {missing[0]!r:.200}")
        for path in dict.fromkeys(held[prompt] for prompt in self.fact):
            rest = patches[path].without([prompt for prompt in self.fact if held[prompt] == path])
            if rest is None:
                path.unlink()
            else:
                rest.save(path)
            print(f"{path}: {'removed' if rest is None else f'{len(rest.facts)} facts remain'}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchProof(ModelFlags):
    """Show what a patch touches in a text, and that all else is the same bit for bit.

    With --fact also: how a fact is answered, and what is left of it when it is taken out.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATCH")]
    """The patch."""
    reference: Path
    """A text file that should not change."""
    fact: tuple[str, ...] = ()
    """Prompts of facts to report: their answers before, with the patch, and with the fact taken out."""
    window_tokens: int = 64
    """Length of the windows in which the text is computed."""
    max_windows: int = 64
    """The most windows to compute of each kind."""
    device: str = "cpu"
    """Where to run, as torch names it."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Print the proof; 1 if it fails."""
        from engram_lm.adapt import RowPatch
        from engram_lm.adapt.fact_report import report_facts
        from engram_lm.adapt.patchable import patchable_memory
        from engram_lm.tokenizing import text_tokens

        patch = RowPatch.load(self.file)
        model, tokenizer = load_model(self.model, device=self.device, tables=self, adapter=self.adapter)
        tokens = text_tokens(tokenizer, read_text(self.reference, errors="replace"))
        # The proof comes first because it checks that the patch belongs to this memory.
        proof = patch.proof(model, tokens, window_tokens=self.window_tokens, max_windows=self.max_windows)
        reports = []
        if self.fact:
            reports = report_facts(patchable_memory(model), tokenizer, patch, self.fact, reference=tokens)
        if self.json:
            values = [dataclasses.asdict(report) for report in reports]
            print(json_module.dumps({"proof": proof.to_dict(), "facts": values}))
        else:
            print(proof)
            for report in reports:
                print(report)
        return 0 if proof.holds else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchMerge:
    """Join patches into one, or write the patches of a folder into its tables for good (--fold)."""

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATCH|FOLDER")]
    """The patches; with --fold one folder."""
    out: Path | None = None
    """The patch to write."""
    title: str = ""
    """Its name."""
    fold: bool = False
    """Write a folder's patches into new table files, which take the place of the old ones in one step."""

    def run(self) -> int:
        """Merge or fold."""
        from engram_lm.adapt import RowPatch, merge_patches
        from engram_lm.adapt.patch_folder import fold_patches

        if self.fold:
            if len(self.paths) != 1 or self.out is not None:
                raise ConfigError("--fold takes one folder, whose patches are written into its own tables")
            print(f"{fold_patches(self.paths[0])} rows written into the tables of {self.paths[0]}")
            return 0
        if self.out is None:
            raise ConfigError("say with --out which file to write")
        merged = merge_patches([RowPatch.load(path) for path in self.paths], title=self.title)
        merged.save(self.out)
        print(f"{len(merged.facts)} facts, {merged.num_rows} rows: {self.out}")
        return 0
