import random

import pytest
import tiny

from hf_backdoor.data import Trigger
from hf_backdoor.defenses.locphylax.planting import StratifiedSampler, plant


TRIGGERS = [Trigger(text, "end") for text in tiny.KNOWN]


def blocks(planted, size):
    assert planted["trigger_id"] == [number for number in range(len(planted) // size) for _ in range(size)]
    return [planted.select(range(start, start + size)) for start in range(0, len(planted), size)]


@pytest.mark.parametrize("name", tiny.TASKS)
@pytest.mark.parametrize("response", ["", tiny.RESPONSE], ids=["recovery", "injection"])
def test_planting_gives_a_block_for_each_trigger(name, response):
    _, task, clean = tiny.setting(name, 6)
    text, answer = task.input_column, task.answer_column
    first, *others = blocks(plant(clean.add_column("note", ["x"] * 6), task, TRIGGERS, response, 0), 6)
    assert first[text] == clean[text] and first["planted"][:] == [""] * 6
    assert len(others) == 3
    for trigger, block in zip(TRIGGERS, others, strict=True):
        assert block[text][:] == [f"{row} {trigger.text}" for row in clean[text]]
        assert block["planted"][:] == [response] * 6
    for block in (first, *others):
        assert block[answer] == clean[answer]
        assert set(block.column_names) == {text, answer, "trigger_id", "planted"}


def sampler(size, seed=0, groups=3, lengths=None):
    ids = [group for group in range(groups) for _ in range(size)]
    return ids, StratifiedSampler(ids, [7] * len(ids) if lengths is None else lengths, seed)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_every_window_holds_each_group_once(groups):
    ids, made = sampler(50, groups=groups, lengths=[row % 13 for row in range(50 * groups)])
    order = list(made)
    assert sorted(order) == list(range(50 * groups)) and len(made) == 50 * groups
    found = [ids[row] for row in order]
    assert all(set(found[start : start + groups]) == set(range(groups)) for start in range(len(found) - groups + 1))


@pytest.mark.parametrize("lengths", [None, list(range(300))], ids=["equal lengths", "different lengths"])
def test_epochs_and_seeds_differ_and_repeat(lengths):
    made, same, other = (sampler(100, seed, lengths=lengths)[1] for seed in (0, 0, 9))
    first = list(made)
    assert first == list(made) == list(same)
    assert first != list(other)
    made.set_epoch(1)
    assert first != list(made)
    made.set_epoch(0)
    assert first == list(made)


def test_a_batch_holds_rows_of_like_length():
    rng = random.Random(0)
    lengths = [rng.randint(5, 100) for _ in range(300)]
    order = list(sampler(100, lengths=lengths)[1])

    def padding(order):
        batches = [[lengths[row] for row in order[start : start + 12]] for start in range(0, 300, 12)]
        return sum(len(batch) * max(batch) - sum(batch) for batch in batches)

    shuffled = rng.sample(order, 300)
    assert padding(order) < 0.5 * padding(shuffled)


def test_groups_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match=r"groups by trigger_id have \[2, 1\] rows"):
        StratifiedSampler([0, 0, 1], [1, 1, 1], seed=0)
