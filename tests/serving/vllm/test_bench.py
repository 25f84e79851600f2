"""``engram-lm bench serve`` with the real engine, on the smallest model."""

import json

import pytest

from engram_lm.cli import main


def test_two_arms_are_measured_and_a_token_reads_its_rows(capsys):
    asked = "bench serve nano --requests 4 --shortest 20 --longest 60 --new-tokens 3 --passes 1 --dtype float32"
    assert main([*asked.split(), "--arms", "none,mmap,mmap_cold", "--sequences", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    none, warm, cold = found["arms"]
    prompt = found["workload"]["prompt_tokens"]
    # One memory layer of two orders with four heads each; the last token of an answer is generated and not read.
    rows = 8 * (prompt + 4 * 2)
    for arm in ("mmap", "mmap_cold"):
        (taken,) = found["raw_passes"][arm]
        assert taken["gathered_rows"] == rows and taken["prompt_tokens"] == prompt and taken["new_tokens"] == 12
    for arm in (warm, cold):
        assert arm["rows_per_token"] == 8 and arm["row_bytes_per_token"] == 8 * 8 * 4
    assert "rows_per_token" not in none and found["workload"]["rows_per_token"] == 8
    assert 0 < found["workload"]["distinct_rows_per_token"] < 8
    assert none["tokens"] == warm["tokens"] == prompt + 12
    assert cold["resident_share_before"] < warm["resident_share_before"]
    assert warm["tokens_per_cpu_second_ratio"] == pytest.approx(
        warm["tokens_per_cpu_second"] / none["tokens_per_cpu_second"]
    )
