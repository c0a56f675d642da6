import pytest

from compress.errors import CompressError
from compress.targets import matches, select

LINEARS = [f"model.layers.{i}.{name}_proj" for i in (0, 1) for name in ("self_attn.q", "mlp.up")]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.0.self_attn.q_proj", 1),
        ("*.q_proj", 2),
        ("*_proj", 4),
        ("model.layers.[0].*", 2),
        (r"re:.*layers\.1\.", 2),
        ("re:model", 4),
        ("re:layers", 0),
        ("q_proj", 0),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    assert sum(matches(pattern, name) for name in LINEARS) == count


def test_select_keeps_order_and_tells_what_was_ignored() -> None:
    selected, ignored = select(LINEARS, ["*.up_proj", "*.q_proj"], ["*.0.*.up_proj", "lm_head"])
    assert selected == [LINEARS[0], LINEARS[2], LINEARS[3]]
    assert ignored == [LINEARS[1]]


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["*.q_porj"], [], "targets: '\\*.q_porj' matches no layer"),
        (["*_proj", "lm_head"], [], "targets: 'lm_head' is the head, .* head: int8 quantises it"),
        (["re:lm_.*"], [], "targets: 're:lm_.*' is the head"),
        (["*_proj"], ["head"], "ignore: 'head' matches no layer"),
        (["*.q_proj"], ["*_proj"], "leave no layer"),
        ([], [], "leave no layer"),
    ],
)
def test_patterns_that_do_nothing(targets: list[str], ignore: list[str], message: str) -> None:
    with pytest.raises(CompressError, match=message):
        select(LINEARS, targets, ignore)
