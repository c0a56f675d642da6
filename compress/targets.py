"""Which linear layers a modifier touches: exact names, globs and ``re:`` patterns.

Names are Hugging Face module names, such as ``model.layers.0.self_attn.q_proj``. ``*`` of a
glob also matches dots; ``re:`` matches from the name's start, as in compressed-tensors.
"""

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from compress.errors import CompressError

HEAD = "lm_head"
_REGEX = "re:"


def pattern_error(pattern: str) -> str | None:
    """What is wrong with a pattern, for a message; None where it is sound."""
    if not pattern.startswith(_REGEX):
        return None
    try:
        re.compile(pattern.removeprefix(_REGEX))
    except re.error as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module ``name``."""
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), name) is not None
    return fnmatchcase(name, pattern)


def select(
    linears: Sequence[str],
    targets: Collection[str],
    ignore: Collection[str],
    never: Sequence[str] = (HEAD,),
) -> tuple[list[str], list[str]]:
    """The linears that targets name, and those of them that ``ignore`` takes out again.

    Args:
        linears: names of the model's linear layers that can be targets.
        targets: patterns; each must match a linear.
        ignore: patterns; each must match a linear or one of ``never``.
        never: the head and the routers, which are no targets and so may be ignored.

    Returns:
        ``(selected, ignored)``, both in the order of ``linears``, disjoint.

    Raises:
        CompressError: a pattern matches nothing, or nothing is left.
    """
    for key, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            named = [*linears, *never] if key == "ignore" else linears
            if not any(matches(pattern, name) for name in named):
                if matches(pattern, HEAD):
                    raise CompressError(
                        f"{key}: {pattern!r} is the head, which no modifier treats: "
                        "head: int8 quantises it when the model is loaded"
                    )
                raise CompressError(
                    f"{key}: {pattern!r} matches no layer: layers have names like {linears[0]}"
                )
    wanted = [name for name in linears if any(matches(p, name) for p in targets)]
    ignored = [name for name in wanted if any(matches(p, name) for p in ignore)]
    selected = [name for name in wanted if name not in set(ignored)]
    if not selected:
        raise CompressError("targets and ignore leave no layer to compress")
    return selected, ignored
