"""What tokens spell, and text made safe to show."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

REPLACEMENT = "\ufffd"
"""What a tokenizer makes of a piece of a character."""
WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f]|['\u2019](?=[^\W\d_]))*")
"""A word: letters, with combining accents and apostrophes inside."""
# A character has at most four bytes, but a text may hold replacement characters of its own, which look unfinished.
_LONGEST_WAIT = 16
# Invisible characters that end lines, move the cursor, start escape sequences or turn the direction of writing.
_TURNS = {0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF}


def spelled(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """Decode raw tokens; those below 0 stand for nothing and are left out."""
    known = [token for token in np.asarray(tokens, np.int64).tolist() if token >= 0]
    return str(tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_places(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Find the places of the tokens that are text: the tokenizer has them, and they are not special."""
    special, names = set(tokenizer.all_special_ids), tokenizer.convert_ids_to_tokens(list(tokens))
    return [
        place
        for place, (token, name) in enumerate(zip(tokens, names, strict=True))
        if name is not None and token not in special
    ]


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> Iterator[str]:
    """Decode tokens one by one, each in the context of the ones before it.

    A token that ends inside a character spells nothing, and the one that completes the character spells all of it.
    Joined, the texts give back the whole text.
    """
    # Tokenizers that strip or merge spaces do so only at the start, and the context keeps the start away.
    context = start = 0
    for end in range(1, len(tokens) + 1):
        text = spelled(tokenizer, tokens[context:end])
        if text.endswith(REPLACEMENT) and end < len(tokens) and end - start < _LONGEST_WAIT:
            yield ""
            continue
        yield text[len(spelled(tokenizer, tokens[context:start])) :]
        context, start = start, end


def visible_text(text: str) -> str:
    """Show control characters as symbols, so that text from anywhere cannot steer a terminal or reorder a page."""
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return REPLACEMENT if 0x80 <= code < 0xA0 or code in _TURNS else character
