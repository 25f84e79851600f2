"""Tokenizers that put special tokens around a text, made of one that does not."""

import copy

from tokenizers.processors import TemplateProcessing


def with_template(tokenizer, template, *, bos="<s>"):
    """Copy a tokenizer and let it follow a template such as ``<s> $A </s>``; ``bos`` becomes its bos token."""
    changed = copy.deepcopy(tokenizer)
    names = [part for part in template.split() if part != "$A"]
    changed.add_special_tokens({"additional_special_tokens": names, **({"bos_token": bos} if bos in names else {})})
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, changed.convert_tokens_to_ids(name)) for name in names]
    )
    return changed
