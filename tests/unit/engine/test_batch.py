"""Batches: which rows stand where, in numbers that can be checked by hand."""

from collections.abc import Callable

from engine.batch import build
from engine.types import Request, ScheduledBatch, ScheduledSequence, Sequence

MakeRequest = Callable[..., Request]


def sequence(request: Request, tokens: list[int], computed: int, table: list[int]) -> Sequence:
    return Sequence(request, request.prompt + tokens, computed=computed, block_table=table)


def test_decodes_a_chunk_and_the_end_of_a_prompt(make_request: MakeRequest) -> None:
    items = [
        ScheduledSequence(sequence(make_request("a", [11, 12, 13]), [14, 15], 4, [7, 0]), 1),
        ScheduledSequence(sequence(make_request("b", [21]), [22], 1, [3]), 1),
        ScheduledSequence(sequence(make_request("c", list(range(31, 41))), [], 2, [5, 1, 9]), 5),
        ScheduledSequence(sequence(make_request("d", [51, 52, 53]), [], 0, [8]), 3),
    ]
    inputs = build(ScheduledBatch(items), block_size=4)
    context = inputs.context
    assert inputs.token_ids_T.tolist() == [15, 22, 33, 34, 35, 36, 37, 51, 52, 53]
    assert context.positions_T.tolist() == [4, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert context.slots_T.tolist() == [0, 13, 22, 23, 4, 5, 6, 32, 33, 34]
    groups = [(g.begin, g.count, g.length) for g in context.groups]
    assert groups == [(0, 2, 1), (2, 1, 5), (7, 1, 3)]
    assert [g.context_lens_B.tolist() for g in context.groups] == [[5, 2], [7], [3]]
    assert context.groups[0].block_tables_BP.tolist() == [[7, 0], [3, 0]]
    assert context.groups[1].block_tables_BP.tolist() == [[5, 1]], "cut to what is computed"
    assert context.groups[2].block_tables_BP.tolist() == [[8]]
    assert inputs.rows_R.tolist() == [0, 1, 9], "the chunk of c ends before its prompt does"


def test_a_batch_of_decodes_only(make_request: MakeRequest) -> None:
    items = [
        ScheduledSequence(sequence(make_request(name, [1, 2]), [], 1, [n]), 1)
        for n, name in enumerate("abc")
    ]
    inputs = build(ScheduledBatch(items), block_size=2)
    assert [(g.count, g.length) for g in inputs.context.groups] == [(3, 1)]
    assert inputs.context.slots_T.tolist() == [1, 3, 5]
    assert inputs.rows_R.tolist() == [0, 1, 2]


def test_a_chunk_that_samples_nothing_asks_for_no_logits(make_request: MakeRequest) -> None:
    item = ScheduledSequence(sequence(make_request("a", 6), [], 0, [0, 1]), 5)
    inputs = build(ScheduledBatch([item]), block_size=4)
    assert [(g.count, g.length) for g in inputs.context.groups] == [(1, 5)]
    assert inputs.rows_R.tolist() == []


def test_a_long_context_does_not_pad_the_short_ones(make_request: MakeRequest) -> None:
    """Padding at most doubles what attention reads."""
    lengths = [1, 1, 50, 1, 1, 2]
    items = [
        ScheduledSequence(sequence(make_request(str(i), n), [], n - 1, list(range(n))), 1)
        for i, n in enumerate(lengths)
    ]
    groups = build(ScheduledBatch(items), block_size=1).context.groups
    assert [g.context_lens_B.tolist() for g in groups] == [[1, 1], [50, 1], [1, 2]]
    assert [g.begin for g in groups] == [0, 2, 4]
