"""Many facts are written into the rows of one memory together, and single ones are taken out again."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.adapt.patched_models import bits, greedy, same_state, trained_model
from tests.adapt.small_models import TEXT, TOKENIZER

from engram_lm import RowPatch
from engram_lm.adapt import FactEdit, JointFitOptions, merge_patches, read_fact_edits
from engram_lm.adapt.edits.expressions import find_expressions, read_wordings, subject_span
from engram_lm.adapt.edits.scoring import score_wordings
from engram_lm.adapt.joint_edit import JointEdit, row_penalties
from engram_lm.adapt.patchable import patchable_memory
from engram_lm.adapt.row_change import same_bits
from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError

CAT = FactEdit(prompt="saw the cat", answer=" mat", subject="the cat", paraphrases=("to a mat ran the cat",))
RAT = FactEdit(prompt="on a rat", answer=" ran", subject="a rat", paraphrases=("cat; a rat",))
DOG = FactEdit(prompt="a sad mat", answer=" ran", subject="sad mat")
FAST = JointFitOptions(max_steps=40, learning_rate=0.3, margin=0.5, num_contexts=0, prefix_tokens=2)
KINDS = {"adapter": {"kind": "adapter"}, "shared table": {"tables": "shared"}, "reference model": {"kind": "reference"}}


def some_edit(num_facts=4, num_expressions=9, heads=3, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fact = torch.cat(
        [torch.arange(num_facts), torch.randint(num_facts, (num_expressions - num_facts,), generator=generator)]
    )
    rows = torch.randint(4, (num_expressions, heads), generator=generator) + 10 * torch.arange(heads)
    rows[torch.rand(rows.shape, generator=generator) < 0.2] = -1
    return JointEdit(
        facts=tuple(FactEdit(prompt=f"prompt {seed} {n}", answer=" x") for n in range(num_facts)),
        tables=("0",),
        fact=fact,
        rows=rows,
        penalty=(rows % 3).clamp(min=0) / 4.0,
        shifts=torch.randn(num_facts, heads, width, generator=generator),
    )


def dense_solution(edit):
    """Every head by itself: rows as unknowns, expressions as equations, by a general solver."""
    found = {}
    for head in range(edit.rows.shape[1]):
        used = edit.rows[:, head] >= 0
        rows = edit.rows[used, head].unique()
        a = (edit.rows[used, head][:, None] == rows).double()
        b = edit.shifts[edit.fact[used], head].double()
        penalty = torch.diag((rows % 3).double() / 4)
        solution = torch.linalg.solve(a.T @ a + penalty, a.T @ b)
        found |= dict(zip(rows.tolist(), solution, strict=True))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_closed_form_equals_a_dense_solution_of_the_normal_equations(seed):
    edit = some_edit(seed=seed)
    expected = dense_solution(edit)
    rows, change = edit.solve()["0"]
    assert rows.tolist() == sorted(expected)
    torch.testing.assert_close(change, torch.stack([expected[row] for row in rows.tolist()]))


def test_the_shares_that_a_fit_counts_on_are_those_that_the_closed_form_leaves():
    edit = some_edit()
    shares = edit.shares()
    for fact in range(4):
        alone = dataclasses.replace(edit, shifts=edit.shifts * (torch.arange(4) == fact)[:, None, None])
        rows, change = alone.solve()["0"]
        for expression, head in ((edit.rows >= 0) & (edit.fact == fact)[:, None]).nonzero().tolist():
            place = rows.tolist().index(int(edit.rows[expression, head]))
            torch.testing.assert_close(change[place].float(), shares[expression, head] * edit.shifts[fact, head])


def test_rows_that_other_text_reads_and_rows_of_short_ngrams_cost_more():
    orders, counts = torch.tensor([2, 2, 3, 3]), torch.tensor([0, 50, 0, 50])
    cost = row_penalties(orders, counts, penalty=0.5, reuse_penalty=2.0, highest_order=3).tolist()
    assert cost[2] == 0.5 and cost[2] < cost[0] < cost[1] and cost[3] < cost[1]


def test_every_wording_of_a_subject_is_read_from_the_same_rows():
    memory = patchable_memory(trained_model())
    subject = "cat ran to"
    facts = [FactEdit(prompt=f"the {subject}", answer=" a", subject=subject, paraphrases=(f"The rat; {subject}",))]
    found = find_expressions(memory, TOKENIZER, facts, num_contexts=8)
    used = [set(rows[rows >= 0].tolist()) for rows in found.rows]
    # All heads of the higher order of both blocks, in every wording alike: other subjects that end in "ran to" read the
    # rows of the lower one.
    assert all(rows == used[0] for rows in used)
    assert len(used[0]) == memory.spec.num_heads * len(memory.spec.blocks)


def test_a_subject_is_not_found_inside_a_longer_word():
    text = "the rat ran; narrate"
    tokens, last, inside = subject_span(TOKENIZER, text, "rat")
    assert inside >= 1 and TOKENIZER.decode(tokens[last + 1 - inside : last + 1]).strip() == "rat"
    assert last < len(tokens) - len(TOKENIZER(" narrate").input_ids)
    assert subject_span(TOKENIZER, text, " rat")[1:] == (last, inside)
    # Where it never stands alone, as in languages without spaces.
    assert subject_span(TOKENIZER, "ran; narrate", "rat")[2] >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_many_facts_hold_together_in_all_their_wordings_and_leave_no_trace(kind, tmp_path):
    model = trained_model(**KINDS[kind])
    before = bits(model)
    facts = [CAT, RAT, DOG]
    patch = RowPatch.fit_facts(model, TOKENIZER, facts, FAST, reference=TEXT, title="three")
    assert patch.is_learned and len(patch.facts) == 3
    assert same_state(bits(model), before)
    patch.save(tmp_path / "patch.safetensors")
    again = RowPatch.load(tmp_path / "patch.safetensors")
    assert again.digest == patch.digest
    again.apply(model)
    memory = patchable_memory(model)
    assert all(score.lead > 0 for score in score_wordings(memory, read_wordings(TOKENIZER, facts)))
    for name, change in patch.tables.items():
        weight = memory.tables[name].weight
        others = torch.ones(len(weight), dtype=torch.bool)
        others[change.rows] = False
        unpatched = trained_model(**KINDS[kind])
        assert same_bits(weight[others], patchable_memory(unpatched).tables[name].weight[others])
    again.revert(model)
    assert same_state(bits(model), before)


def test_a_fact_is_taken_out_of_a_patch_by_solving_again_without_it():
    model = trained_model()
    patch = RowPatch.fit_facts(model, TOKENIZER, [CAT, RAT, DOG], FAST)
    rest = patch.without([RAT.prompt])
    assert [fact.prompt for fact in rest.facts] == [CAT.prompt, DOG.prompt]
    for name, (rows, change) in rest.edit.solve().items():
        assert torch.equal(rest.tables[name].rows, rows)
        now = (rest.tables[name].before.double() + change).float()
        assert same_bits(rest.tables[name].after, now)
    # The rows that were the fact's alone hold what they held before.
    lost = set(patch.tables["0"].rows.tolist()) - set(rest.tables["0"].rows.tolist())
    assert lost
    rest.apply(model)
    scores = score_wordings(patchable_memory(model), read_wordings(TOKENIZER, [CAT, RAT, DOG]))
    assert scores[0].lead > 0 and scores[4].lead > 0 and scores[2].lead < 0
    assert patch.without([CAT.prompt, RAT.prompt, DOG.prompt]) is None
    with pytest.raises(ConfigError, match="no fact with the prompt 'nobody'"):
        patch.without(["nobody"])


def test_later_facts_are_added_to_earlier_ones_whether_these_are_applied_or_not():
    model = trained_model()
    first = RowPatch.fit_facts(model, TOKENIZER, [CAT], FAST)
    both = RowPatch.fit_facts(model, TOKENIZER, [RAT], FAST, earlier=first)
    first.apply(model)
    applied = RowPatch.fit_facts(model, TOKENIZER, [RAT], FAST, earlier=first)
    assert applied.digest == both.digest
    first.revert(model)
    both.apply(model)
    assert all(one.lead > 0 for one in score_wordings(patchable_memory(model), read_wordings(TOKENIZER, [CAT, RAT])))
    with pytest.raises(ConfigError, match="'saw the cat' stands twice"):
        RowPatch.fit_facts(model, TOKENIZER, [CAT], FAST, earlier=both)


def test_a_patch_says_how_its_earlier_facts_are_answered_now():
    model = trained_model()
    first = RowPatch.fit_facts(model, TOKENIZER, [CAT], FAST)
    same_subject = FactEdit(prompt="see the cat", answer=" ran", subject="the cat")
    both = RowPatch.fit_facts(model, TOKENIZER, [same_subject], FAST, earlier=first)
    both.apply(model)
    now = score_wordings(patchable_memory(model), read_wordings(TOKENIZER, [dataclasses.replace(CAT, paraphrases=())]))
    assert both.facts[0].loss_after == pytest.approx(now[0].loss, abs=1e-4)
    assert abs(both.facts[0].loss_after - first.facts[0].loss_after) > 1e-3


def test_an_answer_that_should_be_forgotten_is_no_longer_given():
    model = trained_model()
    known = FactEdit(prompt=CAT.prompt, answer=greedy(model, CAT.prompt, 1), subject="the cat", forget=True)
    memory = patchable_memory(model)
    (before,) = score_wordings(memory, read_wordings(TOKENIZER, [known]))
    assert before.lead > 0
    patch = RowPatch.fit_facts(model, TOKENIZER, [known], FAST)
    assert not patch.facts[0].is_greedy
    patch.apply(model)
    (after,) = score_wordings(memory, read_wordings(TOKENIZER, [known]))
    assert after.lead < 0 and after.probability < before.probability


def test_patches_are_merged_as_if_their_facts_had_been_solved_together():
    model = trained_model()
    one, other = (RowPatch.fit_facts(model, TOKENIZER, [fact], FAST) for fact in (CAT, RAT))
    merged = merge_patches([one, other], title="both")
    solved = one.edit.joined(other.edit).solve()
    assert {name: change.rows.tolist() for name, change in merged.tables.items()} == {
        name: rows.tolist() for name, (rows, _) in solved.items()
    }
    assert merged.without([RAT.prompt]).digest == one.digest
    hand = RowPatch.from_rows(model, {"0": ([1], torch.ones(1, 6))})
    with_hand = merge_patches([merged, hand])
    assert with_hand.num_rows == merged.num_rows + 1
    assert with_hand.without([CAT.prompt, RAT.prompt]).digest == hand.digest
    taken = RowPatch.from_rows(model, {"0": (one.tables["0"].rows[:1], torch.ones(1, 6))})
    with pytest.raises(ConfigError, match=r"row \d+ of table 0 is changed by the patch .* and by one named earlier"):
        merge_patches([one, taken])
    with pytest.raises(ConfigError, match="stands twice"):
        merge_patches([one, one])
    one.apply(model)
    elsewhere = RowPatch.fit_facts(model, TOKENIZER, [dataclasses.replace(CAT, prompt="see the cat")], FAST)
    with pytest.raises(MismatchError, match="other numbers before the patch"):
        merge_patches([one, elsewhere])


def hostile(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def more_tables(tensors, metadata, number):
    """Give the edit a table for each of so many heads, of which the patch has only two."""
    count, facts = len(tensors["edit.fact"]), len(tensors["edit.shifts"])
    tensors["edit.rows"] = torch.full((count, number), -1)
    tensors["edit.penalty"] = torch.zeros(count, number)
    tensors["edit.shifts"] = torch.zeros(facts, number, 1)
    values = json.loads(metadata["edit"])
    metadata["edit"] = json.dumps({**values, "tables": [str(name) for name in range(number)]})


HOSTILE = {
    "a fact without expressions": lambda t, m: t.__setitem__("edit.fact", t["edit.fact"] * 0 + 1),
    "infinite shifts": lambda t, m: t["edit.shifts"].fill_(float("inf")),
    "a negative penalty": lambda t, m: t["edit.penalty"].fill_(-1),
    "rows that it does not have": lambda t, m: t.__setitem__("edit.rows", t["edit.rows"] + 1),
    "fewer heads": lambda t, m: t.__setitem__("edit.shifts", t["edit.shifts"][:, 1:].contiguous()),
    "no rows": lambda t, m: t.pop("edit.rows"),
    "no facts": lambda t, m: m.pop("edit"),
    "facts that are no list": lambda t, m: m.__setitem__("edit", json.dumps({"tables": ["0", "2"], "facts": "x"})),
    "a table that it does not have": lambda t, m: m.__setitem__("edit", m["edit"].replace('"0"', '"7"')),
    "a fact twice": lambda t, m: m.__setitem__(
        "edit", m["edit"].replace(RAT.prompt, CAT.prompt).replace("The rat", "c")
    ),
    "no JSON": lambda t, m: m.__setitem__("edit", "[" * 100_000),
    "very many tables that it does not have": lambda t, m: more_tables(t, m, 10**5),
    "no heads": lambda t, m: t.update(
        {name: t[name][:, :0].contiguous() for name in ("edit.rows", "edit.penalty", "edit.shifts")}
    ),
    "neither facts nor rows": lambda t, m: (
        t.update({f"edit.{part}": t[f"edit.{part}"][:0] for part in ("fact", "rows", "penalty", "shifts")}),
        m.__setitem__("edit", json.dumps({"tables": ["0", "2"], "facts": []})),
    ),
    "a subject that is no text": lambda t, m: m.__setitem__(
        "edit", m["edit"].replace('"subject": "the cat"', '"subject": null')
    ),
    "a number that is too large": lambda t, m: m.__setitem__(
        "facts", json.dumps([{**fact, "loss_after": 10**400} for fact in json.loads(m["facts"])])
    ),
}


@pytest.fixture(scope="module")
def patch_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("joint") / "patch.safetensors"
    RowPatch.fit_facts(trained_model(), TOKENIZER, [CAT, RAT], FAST).save(path)
    return path


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_whose_edit_does_not_fit_together_is_refused(what, patch_file, tmp_path):
    path = tmp_path / "patch.safetensors"
    path.write_bytes(patch_file.read_bytes())
    RowPatch.load(path)
    hostile(path, HOSTILE[what])
    with pytest.raises(CheckpointError, match=r"edit|facts"):
        RowPatch.load(path)


BAD_LINES = {
    '{"prompt": "a", "answer": " b", "subjct": "a"}': "no 'subjct'; did you mean 'subject'",
    '{"prompt": "a"}': "lacks its 'answer'",
    '{"prompt": "a", "answer": " b", "subject": "c"}': "the subject 'c' is not in the wording 'a'",
    '{"prompt": "a", "answer": " b", "subject": null}': "subject holds None",
    '{"prompt": "a", "answer": " b", "subject": []}': r"subject holds \[\]",
    '{"prompt": "a c", "answer": " b", "subject": "a "}': "begins or ends with a space",
    '{"prompt": "a", "answer": " b", "paraphrases": [[]]}': r"paraphrases holds \[\]",
    '{"prompt": "a", "answer": 3}': "answer holds 3",
    '{"prompt": "a", "answer": " "}': "not empty",
    '{"prompt": "a", "answer": " b", "paraphrases": "a"}': "list of texts",
    '{"prompt": "a", "answer": " b", "forget": "yes"}': "true or false",
    '["a", "b"]': "a fact is an object",
    "{": "line 2",
    "[" * 100_000: "line 2",
    "": "line 3|holds no facts",
    '{"prompt": "good", "answer": " c"}': "has the answers ' b' and ' c'",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_file_of_facts_says_what_is_wrong_in_which_line(line, tmp_path):
    path = tmp_path / "facts.jsonl"
    first = '{"prompt": "good", "answer": " b"}\n' if line else "\n"
    path.write_text(f"{first}{line}\n")
    with pytest.raises(DataError, match=BAD_LINES[line]) as caught:
        read_fact_edits(path)
    assert len(str(caught.value)) < 900


def test_a_file_of_facts_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes('{"prompt": "é", "answer": " b"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_fact_edits(path)


def test_repeated_wordings_of_a_fact_count_once():
    repeated = dataclasses.replace(RAT, paraphrases=(RAT.prompt, "to a rat", "on the mat a rat", "to a rat"))
    assert repeated.wordings == (RAT.prompt, "to a rat", "on the mat a rat")
    assert len(RowPatch.fit_facts(trained_model(), TOKENIZER, [repeated], FAST).facts) == 1


def test_facts_come_back_from_their_file(tmp_path):
    facts = (CAT, dataclasses.replace(RAT, old_answer=" a cat", neighbors=("The cat sat on",), forget=True), DOG)
    path = tmp_path / "facts.jsonl"
    # This character divides lines for str.splitlines, and may stand in a JSON text.
    facts = (*facts, FactEdit(prompt="a\u2028b", answer=" c"))
    path.write_text("\n".join(json.dumps(fact.to_dict(), ensure_ascii=False) for fact in facts), encoding="utf-8")
    assert read_fact_edits(path) == facts


def test_scores_of_many_padded_texts_are_those_of_each_text_alone():
    model = trained_model()
    memory = patchable_memory(model)
    wordings = read_wordings(TOKENIZER, [CAT, RAT, DOG])
    together = score_wordings(memory, wordings)
    for one, score in zip(wordings, together, strict=True):
        with torch.no_grad():
            chances = memory.logits(one.tokens).log_softmax(-1)[len(one.prompt) - 1 : -1]
        own = chances[np.arange(len(one.answer)), list(one.answer)]
        assert score.loss == pytest.approx(-float(own.mean()), abs=1e-4)
        assert score.probability == pytest.approx(float(own.sum().exp()), abs=1e-4)
