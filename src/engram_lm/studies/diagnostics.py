"""For which tokens trained models pay: measured on the held-out text of a study, and shown on its page."""

from collections.abc import Mapping
from typing import Any

from engram_lm.evaluation.diagnostics.measure import diagnose
from engram_lm.evaluation.diagnostics.reference import ReferenceText
from engram_lm.evaluation.diagnostics.tables import about, columns, rows
from engram_lm.page.frame import escape, section, table
from engram_lm.training.data.text import TrainingText
from engram_lm.training.recipe import Recipe

_MAX_TOKENS = 16_384
"""Held-out tokens that are read, by every model with its memory on and off."""
_COUNTED_TOKENS = 1 << 22
"""Training tokens that frequencies and N-grams are counted in, about; each million takes some seconds."""
_SHOWN = ("rare_words", "token_frequency", "ngrams_2", "ngrams_3")


def diagnose_models(
    models: Any, tokenizer: Any, text: TrainingText, recipe: Recipe, *, dtype: str = "float32"
) -> dict[str, Any] | None:
    """Diagnose models on the beginning of held-out text, against the text that they were trained on or a sample of it.

    Args:
        models: As for `diagnose`.
        tokenizer: The models' tokenizer.
        text: The text of the study.
        recipe: How the models were trained.
        dtype: Type of matrix products.

    Returns:
        `Diagnostics.to_dict`; None where nothing is held out.
    """
    if text.held_out is None or text.held_out_ends is None:
        return None
    found = diagnose(
        models,
        tokenizer,
        text.held_out,
        document_ends=text.held_out_ends,
        length=recipe.data.sequence_length,
        max_tokens=_MAX_TOKENS,
        dtype=dtype,
        restart_documents=recipe.data.restart_documents,
        reference=ReferenceText.sample(
            name="the training text", tokens=text.train, num_tokens=text.num_tokens, at_most=_COUNTED_TOKENS
        ),
    )
    return found.to_dict()


def diagnostics_section(found: Mapping[str, Any] | None, subject: str = "") -> str:
    """Show `Diagnostics.to_dict` as a part of a page; nothing where there is none.

    ``subject`` says in a sentence which model or text it is about, where the page does not.
    """
    if not found:
        return ""
    tables = [
        f"<h3>{escape(title[:1].upper() + title[1:])}</h3>" * bool(title)
        + table(columns(found), some, label=title or "All tokens", kind="arms")
        for title, some in rows(found, _SHOWN)
    ]
    lead = (
        "Bits for each token of held-out text, by what the token is. <em>More</em> is what a model needs above the "
        "first one. With its memory off, a model is not what it would be if it had been trained without memory: the "
        "rest of it still counts on the memory."
    )
    note = f'<p class="note">{escape(about(found))}</p>'
    about_whom = f"{escape(subject)} " * bool(subject)
    return section("bits", "Bits by kind of token", "\n".join([f"<p>{about_whom}{lead}</p>", *tables, note]))
