"""The small models that plans are held against."""

from tests.model.conftest import build, tokenizer  # noqa: F401
