"""What this library is measured by: a folder per question, each a module that is run from the checkout.

    kernels          what a weight move and an alignment cost          python -m benchmarks.kernels.step
    stages           what a stage costs, alone and on several ranks    python -m benchmarks.stages.bench
    learning_rate    a rate that nobody chose, beside tuned Adam       python -m benchmarks.learning_rate
    end_to_end       what training saves, the paper's protocol         python -m benchmarks.end_to_end
    peers            other people's loops on the same work             python -m benchmarks.peers.race
    gpu_check        all that a GPU has to show, in five parts         python -m benchmarks.gpu_check

All of them time by ``timing``, record what was measured by ``record`` and print it by ``tables``. What was
measured is in ``results``; ``tools/results_doc.py`` puts it into the documentation. Nothing has to be
installed.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = ("instruction", "medical", "chat")
