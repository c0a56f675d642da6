"""An evaluation for people: a small table."""

from rich.table import Table

from compress.measure.figures import Evaluation, Interval, Quality, TaskResult
from compress.measure.paired import drop_estimate


def make_table(result: Evaluation) -> Table:
    """One row for each figure, original and artefact side by side."""
    tokens = "" if result.quality is None else f", {result.quality.tokens} tokens"
    table = Table(title=f"{result.documents} documents{tokens}")
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("artefact", justify="right")
    table.add_column("difference (95 %)", justify="right")
    original, artefact = result.original, result.artefact
    table.add_row("weights", original.weights, artefact.weights, "")
    table.add_row("head", original.head, artefact.head, "")
    table.add_row("KV cache", original.kv_dtype, artefact.kv_dtype, "")
    table.add_row(
        "weights in memory, MB",
        f"{original.weight_bytes / 1e6:.1f}",
        f"{artefact.weight_bytes / 1e6:.1f}",
        f"x {artefact.weight_bytes / original.weight_bytes:.2f}",
    )
    if result.quality is None:
        table.add_row("documents with NaN or infinite logits", "", str(result.broken), "")
    else:
        _add_quality(table, result.quality)
    for task in result.tasks:
        _add_task(table, task)
    table.add_row(
        "scoring, tokens/s",
        f"{original.tokens_per_second:.0f}",
        f"{artefact.tokens_per_second:.0f}",
        f"x {artefact.tokens_per_second / original.tokens_per_second:.2f}",
    )
    for one in result.speed:
        table.add_row(
            f"generating, batch {one.batch}, tokens/s",
            f"{one.original:.0f}",
            f"{one.artefact:.0f}",
            f"x {one.ratio:.2f}",
        )
        table.add_row(
            f"memory, batch {one.batch}, MB",
            f"{one.original_bytes / 1e6:.1f}",
            f"{one.artefact_bytes / 1e6:.1f}",
            f"x {one.artefact_bytes / one.original_bytes:.2f}",
        )
    return table


def _add_quality(table: Table, quality: Quality) -> None:
    table.add_row(
        "perplexity",
        f"{quality.original_perplexity:.4f}",
        f"{quality.artefact_perplexity:.4f}",
        "x " + _interval(quality.perplexity_ratio, 4),
    )
    table.add_row("KL, nats per token", "", "", _interval(quality.kl, 5))
    table.add_row("top-1 flips, %", "", "", _interval(quality.flips, 2, factor=100))


def _add_task(table: Table, task: TaskResult) -> None:
    drop = drop_estimate(task.lost, task.gained, task.items)
    change = Interval(-drop.value, -drop.high, -drop.low)
    table.add_row(
        f"{task.name}, % right of {task.items}",
        f"{100 * task.original_accuracy:.1f}",
        f"{100 * task.artefact_accuracy:.1f}",
        _interval(change, 2, factor=100),
    )


def _interval(interval: Interval, digits: int, factor: float = 1) -> str:
    value, low, high = (factor * x for x in (interval.value, interval.low, interval.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
