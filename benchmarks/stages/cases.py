"""What the stage benchmark measures: its rows, and those who run a stage in each. Imports nothing heavy.

A validation set is 32 examples with a label on every token. ``mixed``: lengths are log-normal with median
0.35 of the longest and σ = 0.6, cut to between 1/16 of the longest and the longest, of which there is one, as
instruction data has it (about 0.4 of the padded rectangle is real). ``equal``: all are as long as the
longest, so that there is no padding to save.

A provider's plain name stands for what users run, the parabolic search with losses by example. Beside it,
where a row is ``full``: the paper's linear search, which has no use for those, and other settings.
"""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLES = 32
SHORT = 2  # evaluations of the shortest stage: τ = 0, and τ = 1 that is not better
LEAST_ROUNDS = 15  # of what is compared to within a percent

AUTHORS, CLEAN, BARE = "authors", "clean eager", "bare forward"
EAGER, STEP, STAGE = "ours eager", "step graph", "stage graph"


def linear(name: str) -> str:
    """The same with the linear search: of the bare forward, the loss without sums by example."""
    return f"{name}, linear"


def one_batch(name: str) -> str:
    """The same with all examples in one micro-batch instead of those that were planned."""
    return f"{name}, one batch"


def ahead(name: str, replays: int) -> str:
    """The same with so many replays launched before an answer is awaited."""
    return f"{name}, {replays} ahead"


def floor(name: str) -> str:
    """The bare captured forward that computes what this provider's steps compute."""
    return linear(BARE) if name.endswith(linear("")) and not name.startswith(BARE) else BARE


@dataclass(frozen=True)
class Case:
    """One row: a model with an adapter, and a validation set.

    ``evaluations``: of the validation loss per stage, the same for every provider. ``full``: all providers,
    else those that answer what the row is for. ``one_batch``: also everything in one micro-batch, where more
    were planned. ``seconds``: what the row takes, a guess for an H100; it is left out where less is left.
    """

    model: str
    length: int
    lengths: str = "mixed"
    method: str = "lora"
    rank: int = 8
    evaluations: int = 10
    full: bool = False
    one_batch: bool = True
    seconds: float = 30.0

    @property
    def name(self) -> str:
        return f"{self.model} {self.method} r={self.rank} {EXAMPLES}×{self.length} {self.lengths}"


SMOL, PYTHIA, LLAMA, TINY = "SmolLM2-135M", "Pythia-1.4B", "Llama-3-8B", "tiny Llama"

# Most wanted first: what no time is left for is left out. After the first ROWS_BEFORE_AGREEMENT the losses
# and τ of all executors are compared, after ROWS_BEFORE_PROFILE the profiler counts, in about 40 and 60 s.
CASES = (
    Case(SMOL, 64, evaluations=6, full=True, seconds=50),
    Case(SMOL, 256, full=True, seconds=60),
    Case(SMOL, 1024),
    Case(LLAMA, 1024, evaluations=3, one_batch=False, seconds=105),
    Case(LLAMA, 64, evaluations=4, seconds=25),
    Case(LLAMA, 256, evaluations=4, seconds=50),
    Case(SMOL, 256, method="dora"),
    Case(PYTHIA, 64, evaluations=6),
    Case(PYTHIA, 256, evaluations=6),
    Case(PYTHIA, 1024, evaluations=4, one_batch=False, seconds=35),
    Case(SMOL, 256, rank=64),
    Case(SMOL, 256, lengths="equal"),
    Case(SMOL, 1024, lengths="equal"),
    Case(LLAMA, 256, method="dora", evaluations=4, seconds=60),
    Case(LLAMA, 256, rank=64, evaluations=4, seconds=50),
    Case(LLAMA, 1024, lengths="equal", evaluations=3, one_batch=False, seconds=150),
)
ROWS_BEFORE_AGREEMENT, ROWS_BEFORE_PROFILE = 3, 5
DRY_CASES = (
    Case(TINY, 16, evaluations=4, full=True, seconds=1),
    Case(TINY, 16, lengths="equal", method="dora", rank=2, evaluations=3, seconds=1),
)
