"""Exact speculation: what is guessed, how much of it is run, and that no text changes."""

import gc
import random
import weakref

import pytest

import engine_kit
from engine_kit import FakePagedRunner, SimClock, make_config, make_request
from scalellm.services.executor.engine import AbortReason, Engine, EngineConfig, EngineRequest
from scalellm.services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.sequence import SequenceGroup
from scalellm.services.executor.engine.speculation import Draft, DraftBudget, Speculator, SuffixDrafter
from scalellm.services.executor.engine.speculation.finished_answers import FinishedAnswers
from scalellm.services.executor.engine.speculation.row_times import RowTimes
from scalellm.services.executor.engine.speculation.survival import Survival
from scalellm.services.executor.engine.speculation.text_index import FORCED, LONGEST_MATCH, TextIndex
from speculation_kit import DRAFTERS, ScriptedDrafter, TakesAll, make_speculator

LONG = {"ignore_eos": True, "max_tokens": 33}


def make_engine(config: EngineConfig, speculator: Speculator | None) -> Engine:
    return Engine(config, FakePagedRunner(config), SimClock(), speculator=speculator)


def make_group(request: EngineRequest, arrival: int = 0) -> SequenceGroup:
    return SequenceGroup(request, arrival=arrival, now=0.0, seed=0, eos_token_ids=frozenset(), max_model_len=1 << 20)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_texts_are_those_without_drafts_and_only_right_ones_save_steps(kind: str) -> None:
    config = make_config()
    outputs, steps = [], []
    for speculator in (None, make_speculator(kind)):
        engine = make_engine(config, speculator)
        for handle in range(3):
            engine.add(make_request(handle, [3, 1, 4, handle], n=2, seed=handle, logprobs=0, **LONG))
        collector = engine_kit.run(engine)
        outputs.append((collector.tokens, collector.logprobs, collector.samples))
        steps.append(engine.stats().steps)
        assert engine.load().free_blocks == config.num_blocks
    assert outputs[0] == outputs[1]
    # Two drafts behind each of the six rows that have one: the step's eight rows are full.
    assert (steps[1] < steps[0]) == (kind in ("right", "random"))
    if kind in ("suffix", "wrong"):
        assert steps[1] == steps[0]
    stats = engine.stats()
    assert stats.draft_tokens >= stats.drafts
    if kind == "right":
        assert stats.draft_tokens == stats.accepted_tokens > 0


def test_one_stream_of_right_drafts_takes_a_step_for_sixteen_tokens() -> None:
    config = make_config(max_model_len=256, num_blocks=128, max_num_seqs=32, max_num_batched_tokens=64)
    engine = make_engine(config, make_speculator("right", max_model_len=256))
    engine.add(make_request(0, [3, 1, 4], ignore_eos=True, max_tokens=1 + 10 * 16))
    engine_kit.run(engine)
    assert engine.stats().steps == 1 + 10
    assert engine.stats().accepted_tokens == 10 * 15


def test_an_answer_that_repeats_one_before_it_costs_few_steps_unless_another_tenant_had_it() -> None:
    config = make_config(max_model_len=256, num_blocks=256, max_num_seqs=32, max_num_batched_tokens=64)
    engine = make_engine(config, Speculator(SuffixDrafter(), TakesAll()))
    counts = []
    for handle, salt in enumerate((b"mine", b"other", b"mine")):
        before = engine.stats().steps
        engine.add(make_request(handle, [5, 6], ignore_eos=True, max_tokens=120, cache_salt=salt))
        engine_kit.run(engine)
        counts.append(engine.stats().steps - before)
    assert counts[1] >= counts[0] - 5  # it repeats itself here and there, by chance
    assert counts[2] < counts[0] / 5


def test_a_prediction_saves_steps_where_it_is_right_and_changes_nothing_where_it_is_wrong() -> None:
    config = make_config(max_model_len=256, num_blocks=256, max_num_seqs=32, max_num_batched_tokens=64)
    request = make_request(0, [5, 6], ignore_eos=True, max_tokens=100)
    expected, _ = engine_kit.undisturbed(request, 0, 256)
    edited = [*expected[:40], 1, 2, 3, *expected[45:]]
    steps = []
    for prediction in (expected, edited, [9] * 100):
        engine = make_engine(config, Speculator(SuffixDrafter(), TakesAll()))
        engine.add(make_request(0, [5, 6], ignore_eos=True, max_tokens=100, prediction_token_ids=tuple(prediction)))
        collector = engine_kit.run(engine)
        assert collector.tokens[(0, 0), 0] == expected
        steps.append(engine.stats().steps)
    assert steps[0] <= 1 + 7
    assert steps[1] <= 1 + 16
    assert steps[2] > 50


def test_no_draft_takes_the_last_blocks_or_preempts_anybody() -> None:
    config = make_config(num_blocks=17, max_model_len=32, enable_prefix_cache=False)
    engine = make_engine(config, make_speculator("right", max_model_len=32))
    for handle in range(2):
        engine.add(make_request(handle, [handle] * 4, ignore_eos=True, max_tokens=28))
    engine_kit.run(engine)
    assert engine.stats().accepted_tokens > 0
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize(
    "changes", [{"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}]
)
def test_penalties_go_without_drafts(changes: dict[str, float]) -> None:
    engine = make_engine(make_config(), make_speculator("right"))
    engine.add(make_request(0, [1, 2, 3], **LONG, **changes))
    engine_kit.run(engine)
    assert engine.stats().draft_tokens == 0


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    drafter = SuffixDrafter()
    speculator = Speculator(drafter, TakesAll())
    engine = make_engine(make_config(), speculator)
    groups: list[weakref.ref[SequenceGroup]] = []
    for handle, way in enumerate(("end", "abort", "give_back", "drop")):
        request = make_request(handle, [handle, 2, 3, 4], link=handle, n=2, **LONG)
        engine.add(request)
        for _ in range(5):
            engine.step()
        group = engine._books.get(request.key)
        assert group is not None
        groups.append(weakref.ref(group))
        del group
        match way:
            case "end":
                engine_kit.run(engine)
            case "abort":
                engine.abort(request.key, None, AbortReason.CANCELLED)
            case "give_back":
                engine.give_back(request.key, "elsewhere")
            case "drop":
                engine.drop_link(handle)
        while engine.has_unfinished():
            engine.step()
    gc.collect()
    assert [group() for group in groups] == [None] * 4
    assert (speculator._guesses, drafter._own, drafter._given) == ({}, {}, {})
    assert len(drafter._answers) == 2  # the samples that came to their end


def test_a_text_is_found_where_its_last_tokens_stood_last() -> None:
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5]
    index = TextIndex(text)
    assert index.find([1, 2, 3]) is None
    index.extend(1)
    assert index.find([1, 2, 3]) == (text, 3, 3)
    index.extend(100)
    assert index.find([8, 1, 2, 3]) == (text, 8, 3)
    assert index.find([9, 1, 2, 3]) == (text, 8, 4)
    assert index.find([2, 3]) is None
    assert index.find([1, 2, 3, 5]) is None  # the end: nothing follows it yet
    text += [7]
    index.extend(100)
    assert index.find([1, 2, 3, 5]) == (text, 9, 4)


def test_longest_matches_are_compared_so_far_and_no_further() -> None:
    text = list(range(100))
    index = TextIndex(text)
    index.extend(1000)
    found = index.find(text[:90])
    assert found is not None
    assert (found.at, found.length) == (90, LONGEST_MATCH)


def test_finished_answers_are_bounded_apart_by_salt_and_the_useful_ones_stay() -> None:
    answers = FinishedAnswers(max_tokens=100)
    answers.add(b"a", range(40))
    answers.add(b"b", range(40))
    assert answers.find(b"c", [5, 6, 7]) is None
    found = answers.find(b"a", [5, 6, 7])  # now b's is the one that was of no use for longest
    assert found is not None
    assert found.text[found.at : found.at + 3] == (8, 9, 10)
    answers.add(b"a", range(20, 60))
    assert answers.find(b"b", [5, 6, 7]) is None
    assert answers.find(b"a", [5, 6, 7]) is not None
    newest = answers.find(b"a", [37, 38, 39])
    assert newest is not None
    assert newest.text[newest.at] == 40
    answers.add(b"a", range(100, 1000))  # cut: as long as all may be
    assert len(answers) == 1
    assert answers._num_tokens == 100
    assert len(answers._next) == 97
    answers.add(b"a", [1, 2, 3])  # says nothing of what follows
    assert len(answers) == 1


def test_of_finished_answers_no_entry_is_left_behind() -> None:
    rng, answers = random.Random(0), FinishedAnswers(max_tokens=200)
    for _ in range(300):
        answers.add(rng.choice((b"", b"x")), [rng.randrange(4) for _ in range(rng.randrange(60))])
        answers.find(b"", [rng.randrange(4) for _ in range(3)])
        assert answers._num_tokens == sum(len(tokens) for _, tokens in answers._answers.values()) <= 200
        assert {number for number, _ in answers._next.values()} <= set(answers._answers)


def test_survival_follows_what_drafts_did_and_begins_with_what_is_known_of_others() -> None:
    everybody = Survival()
    assert everybody.chance(5) == 0.5
    sure, unsure = Survival(everybody), Survival(everybody)
    for _ in range(200):
        sure.observe(8, is_right=True)
        unsure.observe(3, is_right=False)
    assert sure.chance(8) > 0.95
    assert unsure.chance(3) < 0.05
    newcomer = Survival(everybody)
    assert newcomer.chance(8) > 0.9
    assert newcomer.chance(3) < 0.1
    assert newcomer.chance(4) == 0.5
    assert newcomer.chance(FORCED) == 0.5


def times(base: float, per_row: float, rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)) -> RowTimes:
    measured = RowTimes()
    for number in range(9):
        for count in rows:
            measured.observe(count, base + per_row * count + 50.0 * (number == 0))  # the first ones are recorded
    return measured


def budget(target_itl: float | None = None) -> DraftBudget:
    """Knows of steps that take 9 s, and 1 s per row."""
    return DraftBudget(target_itl, times(9.0, 1.0))


def decodes(count: int) -> ScheduledBatch:
    group = make_group(make_request(0, [1]))
    rows = [ScheduledSequence(group.samples[0], 10, 1, samples=True, first_new_block=1) for _ in range(count)]
    return ScheduledBatch(1, rows, num_decodes=count, num_tokens=count)


def test_times_of_steps_are_a_line_over_their_rows() -> None:
    line = times(9.0, 1.0)
    assert line.per_row == pytest.approx(1.0, rel=0.01)
    assert line.seconds(1) == pytest.approx(10.0, rel=0.01)
    assert line.seconds(40) == pytest.approx(49.0, rel=0.01)
    line.observe(1, 1e6)  # somebody else had the processor
    assert line.seconds(1) < 15.0


def test_a_row_more_costs_nothing_where_that_is_not_known_and_what_it_costs_is_learned_at_once() -> None:
    line = times(9.0, 1.0, rows=(1,))
    assert line.per_row == 0.0
    for _ in range(3):
        line.observe(2, 11.0)
    assert 0.5 < line.per_row <= 1.0
    for _ in range(1000):  # it is forgotten, and so tried again
        line.observe(1, 10.0)
    assert line.per_row < 0.01


def test_drafts_are_run_while_tokens_per_second_rise() -> None:
    assert budget().divide(decodes(1), [[1.0] * 15], 60) == [15]
    # The second draft of a chain survives with the chance that both are right.
    assert budget().divide(decodes(1), [[0.5] * 15], 60) == [2]
    assert budget().divide(decodes(1), [[0.1] * 15], 60) == [0]
    assert budget().divide(decodes(3), [[0.5] * 3, [], [1.0] * 3], 60) == [1, 0, 3]
    assert budget().divide(decodes(2), [[0.9] * 15, [0.8] * 15], 5) == [4, 1]


def test_under_load_no_draft_is_worth_its_row() -> None:
    assert budget().room(decodes(8)) > 0
    assert budget().room(decodes(70)) == 0  # not even a sure one
    assert budget().divide(decodes(40), [[0.9]] * 40, 24) == [0] * 40
    assert budget().divide(decodes(2), [[0.9]] * 2, 24) == [1, 1]


def test_a_step_with_drafts_keeps_the_target() -> None:
    assert budget(target_itl=13.5).divide(decodes(1), [[1.0] * 15], 60) == [3]
    assert budget(target_itl=1.0).divide(decodes(1), [[1.0] * 15], 60) == [0]


def test_nothing_is_guessed_before_there_are_measurements_and_rows_are_tried_by_doubling() -> None:
    fresh = DraftBudget(None)
    assert fresh.room(decodes(1)) == 0
    for rows in (1, 4):
        for _ in range(9):
            fresh.observe(decodes(rows), 0.01)
        assert fresh.room(decodes(1)) == 2 * rows - 1
    prompt = decodes(64)
    prompt.num_tokens += 1
    fresh.observe(prompt, 0.01)  # with a part of a prompt
    assert fresh.room(decodes(1)) == 7


@pytest.mark.parametrize("is_right", [True, False])
def test_the_engine_learns_from_its_own_steps_how_many_drafts_pay(is_right: bool) -> None:
    """Steps take 9 s and 1 s per row: right drafts are run soon and wrong ones soon no more."""
    config = make_config(max_model_len=512, num_blocks=256, max_num_seqs=32, max_num_batched_tokens=64)
    clock = SimClock()
    runner = FakePagedRunner(config, on_execute=lambda batch: clock.advance(9.0 + batch.num_tokens))
    request = make_request(0, [5, 6], ignore_eos=True, max_tokens=400)
    expected, _ = engine_kit.undisturbed(request, 0, 512)

    def guess(seq, position):  # type: ignore[no-untyped-def]
        place = position - seq.group.num_prompt_tokens
        return (expected[place] + (not is_right)) % engine_kit.VOCAB if place < len(expected) else None

    speculator = Speculator(ScriptedDrafter(guess), DraftBudget(None))
    engine = Engine(config, runner, clock, speculator=speculator)
    engine.add(request)
    started = clock.now
    collector = engine_kit.run(engine)
    assert collector.tokens[(0, 0), 0] == expected
    plain = 11.0 + 399 * 10.0
    took = clock.now - started
    if is_right:
        assert took < plain / 3
        assert engine.stats().accepted_tokens == engine.stats().draft_tokens
    else:
        assert took < plain * 1.02
        assert engine.stats().draft_tokens < 20


def test_a_draft_longer_than_what_is_left_is_cut() -> None:
    config = make_config(max_num_seqs=32, max_num_batched_tokens=64)
    most: list[int] = []

    class Asked(ScriptedDrafter):
        def draft(self, seq, count):  # type: ignore[no-untyped-def]
            most.append(count)
            return Draft([1] * count, 5)

    engine = make_engine(config, Speculator(Asked(lambda seq, position: None), TakesAll()))
    engine.add(make_request(0, [1, 2, 3], ignore_eos=True, max_tokens=4))
    engine_kit.run(engine)
    assert most[0] == 2  # the first token came with the prompt, the next one comes anyway
    assert max(most) == 2
