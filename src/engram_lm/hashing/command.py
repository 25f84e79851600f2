"""``engram-lm hash``: row numbers of a text under any published config."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from engram_lm.errors import ConfigError, TokenError, TokenMapError
from engram_lm.hashing.spec import HashSpec
from engram_lm.hashing.spec_fields import expected_map
from engram_lm.hashing.token_map import TokenMap, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hash:
    """Print the row numbers that a text reads, by layer, under any published config; or what a token map merges.

    Configs of the paper's demo, DeepSeek-V4.1, Qwen PLE (qwen4_exp), LongCat and of this library's own models are
    recognized by their keys.

    Examples::

        engram-lm hash --config config.json --tokenizer FOLDER --text "Alexander the Great"
        engram-lm hash --config config.json --ids 1,2,3 --json
        engram-lm hash --tokenizer FOLDER --stats
    """

    config: Path | None = None
    """A model's config.json, or the folder that holds it."""
    tokenizer: Path | None = None
    """A folder with tokenizer.json, or that file. Not needed for configs that hash raw ids (Qwen, LongCat)."""
    token_map_digest: str | None = None
    """Refuse the tokenizer if its token map has another digest than this; --stats prints it."""
    text: str | None = None
    """Text to hash; special tokens are not added."""
    ids: str | None = None
    """Token ids to hash instead, separated by commas."""
    stats: bool = False
    """Print the compression of the tokenizer's token map and its largest merged groups."""
    groups: int = 10
    """Merged groups that --stats prints."""
    json: bool = False
    """Print JSON; multipliers are strings, because many readers of JSON round large integers."""

    def __post_init__(self) -> None:
        if self.stats:
            if self.tokenizer is None:
                raise ConfigError("--stats describes a token map: name its tokenizer with --tokenizer")
            if self.groups < 1:
                raise ConfigError(f"--groups must be at least 1, not {self.groups}")
            return
        if self.config is None:
            raise ConfigError("name the model's config.json with --config (or ask for --stats of a --tokenizer)")
        if (self.text is None) == (self.ids is None):
            raise ConfigError("give exactly one of --text and --ids")
        if self.text is not None and self.tokenizer is None:
            raise ConfigError("--text needs the --tokenizer that turns it into tokens")

    def run(self) -> int:
        """Print what was asked for."""
        if self.stats:
            return self._print_stats()
        assert self.config is not None
        tokenizer = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        spec = HashSpec.from_config(self.config, tokenizer, token_map_digest=self.token_map_digest)
        if spec.token_map is None:
            raise TokenMapError("this config hashes canonical tokens: name the model's tokenizer with --tokenizer")
        tokens = self._tokens(tokenizer)
        rows = {layer: spec.rows(tokens, layer) for layer in spec.layers}
        if self.json:
            multipliers = spec.multipliers or ((),) * len(spec.layers)
            layers = {
                str(layer): {"primes": primes, "multipliers": list(map(str, drawn)), "rows": rows[layer].tolist()}
                for layer, primes, drawn in zip(spec.layers, spec.primes, multipliers, strict=True)
            }
            about = {"variant": spec.variant, "digest": spec.digest, "token_map_digest": spec.token_map_digest}
            print(json_module.dumps({**about, "ids": tokens.tolist(), "layers": layers}))
            return 0
        self._print_rows(spec, tokenizer, tokens, rows)
        return 0

    def _tokens(self, tokenizer: Any) -> np.ndarray:
        if self.ids is None:
            tokens = tokenizer.encode(self.text, add_special_tokens=False).ids
        else:
            try:
                tokens = [int(token) for token in self.ids.replace(",", " ").split()]
            except ValueError as error:
                raise TokenError(f"--ids takes whole numbers separated by commas, not {self.ids!r}") from error
        if not tokens:
            raise TokenError("there are no tokens to hash; give some --text or --ids")
        if max(tokens) >= 2**63 or min(tokens) < -(2**63):
            raise TokenError(f"a token id is a number below the vocabulary size, not {max(tokens, key=abs)}")
        return np.array([tokens], dtype=np.int64)

    def _print_rows(self, spec: HashSpec, tokenizer: Any, tokens: np.ndarray, rows: dict[int, np.ndarray]) -> None:
        console = Console()
        console.print(f"{spec.variant}, orders {spec.orders}, {spec.num_heads} heads each, digest {spec.digest}")
        console.print(f"token map {spec.token_map_digest}", highlight=False)
        for layer in spec.layers:
            table = Table(title=f"layer {layer}: {spec.num_rows(layer):,} rows", title_justify="left")
            table.add_column("token", justify="right")
            table.add_column("text")
            for order in spec.orders:
                table.add_column(f"rows of the {order}-gram", overflow="fold")
            for position, token in enumerate(tokens[0]):
                shown = tokenizer and repr(tokenizer.decode([int(token)], skip_special_tokens=False))[1:-1]
                heads = rows[layer][0, position].reshape(len(spec.orders), spec.num_heads)
                table.add_row(str(token), Text(shown or ""), *(" ".join(map(str, order)) for order in heads))
            console.print(table)

    def _print_stats(self) -> int:
        tokenizer = load_tokenizer(self.tokenizer)
        token_map = TokenMap.from_tokenizer(tokenizer)
        expected_map(token_map.digest, self.token_map_digest)
        groups = token_map.largest_groups(self.groups, tokenizer)
        if self.json:
            values = {
                "num_tokens": token_map.num_tokens,
                "num_canonical": token_map.num_canonical,
                "compression": token_map.compression,
                "digest": token_map.digest,
                "groups": [{"text": text, "count": count, "tokens": tokens} for text, count, tokens in groups],
            }
            print(json_module.dumps(values, ensure_ascii=False))
            return 0
        columns = ("canonical", Column("tokens", justify="right"), "among them")
        table = Table(*columns, title="largest merged groups", title_justify="left")
        for text, count, tokens in groups:
            table.add_row(Text(repr(text)), str(count), Text(" ".join(map(repr, tokens))))
        console = Console()
        console.print(
            f"{token_map.num_tokens:,} tokens → {token_map.num_canonical:,} canonical tokens "
            f"({token_map.compression:.2%} fewer), digest {token_map.digest}",
            highlight=False,
        )
        console.print(table)
        return 0
