"""Short ways to let one analysis look on, for tests."""

from engram_lm.analysis import Cka, GateStatistics, LogitLens, RowUse, look
from engram_lm.tokenizing import text_tokens


def average_gates(model, tokenizer, text, *, length=512, **options):
    (found,) = look(model, tokenizer, text, GateStatistics(**options), length=length).models.values()
    return found


def row_use(model, tokenizer, text, *, length=512, **options):
    tokens = text_tokens(tokenizer, text) if isinstance(text, str) else text
    (found,) = look(model, tokenizer, tokens, RowUse(tokens, **options), length=length).models.values()
    return found


def logit_lens(models, tokenizer, text, *, one_in=1, **options):
    return look(models, tokenizer, text, LogitLens(one_in=one_in), **options)


def layer_similarity(models, tokenizer, text, *, length=512, max_tokens=None, budget_bytes=1 << 29, **options):
    reading = {"length": length, "max_tokens": max_tokens, "budget_bytes": budget_bytes}
    return look(models, tokenizer, text, Cka(**options), **reading)
