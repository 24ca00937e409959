"""What every test may rely on."""

import gc
import importlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # a machine that has what the tests on a GPU need
    pass
else:  # the same examples every time, however slow the machine is at that moment
    settings.register_profile("tests", deadline=None, derandomize=True)
    settings.load_profile("tests")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def benchmarks():
    """The modules in benchmarks/ by name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="session")
def tool():
    """The modules in tools/ by name."""
    return lambda name: importlib.import_module(f"tools.{name}")


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_arrives():
    """A job that a shell put into the background starts with SIGINT ignored; tests of Ctrl-C need it back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def same_environment():
    """Libraries set variables for good (PEFT's BOFT chooses a compiler); the next test shall not see them."""
    before = dict(os.environ)
    yield
    added = os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}
    for name in added:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value and name != "PYTEST_CURRENT_TEST":
            os.environ[name] = value


@pytest.fixture()
def default_precision():
    """PyTorch's precision of float32 products, as it is at the start, before and after the test.

    The old and the new interface keep states of their own: setting the old one back sets the new one too.
    """
    torch = pytest.importorskip("torch")

    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        for holder in (
            torch.backends,
            torch.backends.cudnn,
            torch.backends.cuda.matmul,
            torch.backends.mkldnn,
            torch.backends.mkldnn.matmul,
        ):
            holder.fp32_precision = "none"

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """TrainConfig arguments: a random two-layer GPT-NeoX over bytes, and 120 lines of arithmetic.

    A model and a task so small that a training step takes milliseconds.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("small")
    config = transformers.GPTNeoXConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=257,
        eos_token_id=257,
        tokenizer_class="ByteTokenizer",
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    pairs = [{"prompt": f"{a}+{b}=", "response": f"{a + b}."} for a in range(12) for b in range(10)]
    data = folder / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "data": str(data),
        "lr": 1e-3,
        "warmup_steps": 2,
        "batch_size": 8,
        "steps": 10,
        "max_length": 16,
        "rank": 4,
        "test_examples": 16,
        "validation_examples": 8,
        "evaluate_every": 0,
        "device": "cpu",
    }


def _batch(rows: int = 5, length: int = 24, *, left: bool = False, seed: int = 0, prompt: int = 2):
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        kept = int(torch.randint(prompt + 2, length + 1, (), generator=generator))
        padding = slice(0, length - kept) if left else slice(kept, length)
        first = length - kept if left else 0
        mask[row, padding] = 0
        ids[row, padding] = 0
        labels[row, padding] = -100
        labels[row, first : first + prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def padded_batch():
    """`padded_batch(rows, length, left=, seed=, prompt=)`: random rows, the prompt's labels −100.

    Token numbers are below 97, which all models of the tests have.
    """
    return _batch


@pytest.fixture(scope="session")
def situations():
    """The module `tests/graphs/situations.py`; its assertions show what they compared, as a test's do."""
    pytest.register_assert_rewrite("eager_twins", "situations")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "graphs"))
        yield importlib.import_module("situations")


# Tiny random causal language models, and a stand-in for CUDA.
_SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_FAMILIES = {
    "gpt_neox": ("GPTNeoX", dict(attention_dropout=0.3, hidden_dropout=0.3)),
    "llama": ("Llama", dict(num_key_value_heads=2, attention_dropout=0.3)),
    "gpt2": ("GPT2", {}),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=8, attention_dropout=0.3)),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=8, attention_dropout=0.3)),
    "gemma2": ("Gemma2", dict(num_key_value_heads=2, head_dim=8)),
    "mistral": ("Mistral", dict(num_key_value_heads=2)),
    "granite": ("Granite", dict(num_key_value_heads=2, logits_scaling=4.0)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2)),
    "gemma3": ("Gemma3", dict(num_key_value_heads=2, head_dim=8)),
    "opt": ("OPT", dict(ffn_dim=64, word_embed_proj_dim=32)),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", dict(num_key_value_heads=2)),
    "olmo2": ("Olmo2", {}),
    "stablelm": ("StableLm", dict(num_key_value_heads=4)),
    "starcoder2": ("Starcoder2", dict(num_key_value_heads=4)),
    "gptj": ("GPTJ", dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4)),
    "bloom": ("Bloom", {}),
    "mixtral": ("Mixtral", dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
    ),
    "olmoe": ("Olmoe", dict(num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (
        "GptOss",
        dict(num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    ),
}


def _build(family: str, **changes):
    transformers = pytest.importorskip("transformers")
    name, extra = _FAMILIES[family]
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**(_SIZES | extra | changes))
    torch.manual_seed(7)
    model = getattr(transformers, head)(config)
    with torch.no_grad():  # far from uniform predictions, so that a wrong position or token shows
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.train()


@pytest.fixture
def tiny_model():
    """`tiny_model(family, **config)`: a fresh model in training mode, the same weights every time."""
    return _build


@pytest.fixture
def own_loss():
    """`own_loss(model, batches)`: the token-weighted mean of `model(**batch).loss`, in eval mode."""

    def measure(model, batches, shifted=True):
        training = model.training
        model.eval()
        with torch.no_grad():
            counts = [int(((b["labels"][:, 1:] if shifted else b["labels"]) != -100).sum()) for b in batches]
            losses = [float(model(**batch).loss) for batch in batches]
        model.train(training)
        return sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)

    return measure


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _nothing_announced_yet(monkeypatch):
    monkeypatch.setattr("ffkernels.ops.notices._announced", set())


_NUMBERS = itertools.count(1000)


@pytest.fixture
def fake(monkeypatch, request):
    """`FakeCuda` in the place of CUDA: captures on the CPU; see `graphs/fake_cuda.py`."""
    name = "ffkernels_fake_cuda"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "graphs" / "fake_cuda.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    installed = sys.modules[name].FakeCuda.install(monkeypatch)
    from triton.runtime import interpreter

    # Triton's language is made ready for the interpreter once, not for each of many launches.
    prepared = interpreter._patch_lang(installed.decide._decide_kernel.fn)
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
    request.addfinalizer(prepared.restore)
    # A capture looks through all objects for tensors: through those that this test makes.
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    # A graph that an earlier test forgot is closed when it is collected: it must not mean one of this test.
    installed._numbers = _NUMBERS
    installed.graph_class = sys.modules[name].Graph
    # A graph has no autograd; the functions that stand for it here would.
    monkeypatch.setattr(installed.graph_class, "run", torch.no_grad()(installed.graph_class.run))
    return installed


@pytest.fixture(scope="session")
def in_ranks():
    """`in_ranks(2, "scenario", seconds=20, **arguments)`: what each rank answered; see `rank_server.py`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "ranks" / "rank_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )

    def ask(size, scenario, seconds=20, **arguments):
        request = {"scenario": scenario, "ranks": size, "seconds": seconds, "arguments": arguments}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    assert server.stdout.readline() == "ready\n"
    yield ask
    server.stdin.close()
    server.wait(timeout=10)
