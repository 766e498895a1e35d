"""The tuner of the kernels: candidates, the choice among them and the table."""

import json

import pytest
import torch

from slimvit.errors import SlimvitError

pytestmark = pytest.mark.triton

STAGES = ("linear", "qkv", "proj", "fc1", "fc2", "mlp", "attention", "last_attention", "embedding")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rows", [32, 512, 4096, None])
def test_candidates_begin_with_the_present_one_and_fit(bench, configs, stage, rows):
    table = bench("tune_table")
    key = table.Key(stage, 90, 2, 192, rows)
    current = (32, 32, 32, 4, 2)
    found = table.candidates(key, current, 100_000)
    assert found[0] == current
    assert 6 <= len(found) == len(set(found))
    assert all(table.shared(key, config) <= 100_000 for config in found)
    for config in found:
        assert all(not value or value & (value - 1) == 0 for value in config[:4])


def test_images_of_an_embedding_may_be_float32(bench):
    """They are measured in half precision, and take twice the memory in float32."""
    table = bench("tune_table")
    key = table.Key("embedding", 86, 2, 768, None)
    assert table.shared(key, (128, 64, 64, 4, 4)) == (4 * 128 + 2 * 64) * 64 * 4
    current = (64, 64, 32, 4, 3)
    assert (128, 64, 64, 4, 4) not in table.candidates(key, current, 101376)


def test_last_attention_is_tuned_for_its_tiles_of_queries(bench, configs):
    """What is measured with 16 queries at most says nothing about more of them."""
    bounds = bench("tune_table").buckets(configs.entries(), "last_attention", 90, 2)
    assert bounds == [16, None]


def test_the_fastest_that_always_works_is_chosen(bench):
    choose, a, b, c = bench("tune_table").choose, (1,) * 5, (2,) * 5, (3,) * 5
    assert choose({a: [4.0, 4.0], b: [2.0, 2.0], c: [1.0, None]}, [1, 1], a) == (b, a, 2.0)
    assert choose({a: [4.0], b: [3.95]}, [1], a).config == a  # within what measuring scatters
    assert choose({a: [2.0, 2.0], b: [1.0, 8.0]}, [1, 1], a).config == a
    assert choose({a: [2.0, 2.0], b: [1.0, 8.0]}, [5, 1], a).config == b
    assert choose({a: [None], b: [1.0]}, [1], a).config == b
    assert choose({a: [None], b: [None]}, [1], a).config == a


def test_the_table_is_written_as_it_is(bench, configs):
    assert bench("tune_table").text_of(configs.entries()) == configs.TABLE.read_text()


def choices(bench, configs, *found):
    """Keys with choices: (stage, width, rows, config or None for no change)."""
    table = bench("tune_table")
    made = {}
    for stage, width, rows, config in found:
        key = table.Key(stage, 90, 2, width, rows)
        before = bench("tune").astuple(configs.lookup(*key[:4], rows or table.UNBOUNDED))
        made[key] = table.Choice(config or before, before, 2.0)
    return made


def test_special_entries_come_first_and_others_stay(bench, configs):
    table, tune, old = bench("tune_table"), bench("tune"), configs.entries()
    wide = choices(bench, configs, ("qkv", 384, 512, (64,) * 5), ("mlp", 192, None, None))
    entries = table.merged(old, wide)
    narrow = choices(bench, configs, ("qkv", 192, None, (16,) * 5), ("qkv", 192, 512, (8,) * 5))
    entries = table.merged(entries, narrow)
    assert [entry for entry in entries if entry in old] == old
    assert len(entries) == len(old) + 3  # nothing changed for mlp
    tune.validate(table.text_of(entries), wide | narrow, configs, old)
    again = table.merged(entries, choices(bench, configs, ("qkv", 192, 512, (4,) * 5)))
    assert len(again) == len(entries)
    assert sum(entry["config"] == [4] * 5 for entry in again) == 1


def test_a_narrower_model_does_not_fall_under_a_wider_ones_entry(bench, configs):
    found = choices(bench, configs, ("fc1", 768, 512, (64,) * 5), ("fc1", 384, 512, None))
    entries = bench("tune_table").merged(configs.entries(), found)
    bench("tune").validate(bench("tune_table").text_of(entries), found, configs, configs.entries())


@pytest.mark.parametrize("spoil", ["shadowed", "dropped", "no JSON"])
def test_a_wrong_table_is_refused(bench, configs, spoil):
    table, tune, old = bench("tune_table"), bench("tune"), configs.entries()
    found = choices(bench, configs, ("qkv", 192, 512, (8,) * 5))
    entries = table.merged(old, found)
    if spoil == "shadowed":
        entries = [*old, *(entry for entry in entries if entry not in old)]
    elif spoil == "dropped":
        entries = [entry for entry in entries if entry["kernel"] != ["last_attention"]]
    text = table.text_of(entries)[: -2 if spoil == "no JSON" else None]
    with pytest.raises((SlimvitError, json.JSONDecodeError)):
        tune.validate(text, found, configs, old)
    assert configs.entries() == old  # and the kernels read their own table again


def test_launches_are_made_on_the_device_that_was_asked_for(bench, monkeypatch):
    tune, current = bench("tune"), []

    def shapes(args, device, *_):
        assert current == [device]
        raise InterruptedError(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(tune, "shapes", shapes)
    with pytest.raises(InterruptedError, match="cuda:1"):
        tune.main(["--device", "cuda:1", "--dry-run"])
