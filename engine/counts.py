"""What a scheduler counts since it began."""

from dataclasses import dataclass

from engine.block_manager import BlockManager
from engine.types import EngineStats


@dataclass(slots=True)
class Counts:
    """Tokens, but for ``preempted``: how often a sequence gave its blocks up."""

    prompt: int = 0
    generated: int = 0
    preempted: int = 0
    cached: int = 0
    recomputed: int = 0
    drafted: int = 0
    accepted: int = 0

    def stats(self, queued: int, running: int, blocks: BlockManager) -> EngineStats:
        """With what is there now."""
        return EngineStats(
            queued=queued,
            running=running,
            blocks_used=blocks.used_blocks,
            blocks_free=blocks.available_blocks - blocks.cached_blocks,
            blocks_cached=blocks.cached_blocks,
            prompt_tokens=self.prompt,
            generated_tokens=self.generated,
            preemptions=self.preempted,
            cached_tokens=self.cached,
            recomputed_tokens=self.recomputed,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )
