"""Engines in one process: vLLM is imported once, an engine takes 3 to 5 seconds."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Without these two the engine binds to a core and keeps another one for itself.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Dynamo without inductor: what compilation freezes shows in two seconds instead of 75.
    "VLLM_CPU_CI_ENV": "1",
    # int8 activations, the default of stock AWQ at bfloat16, are another model.
    "VLLM_CPU_INT4_W4A8": "0",
}
PROMPTS = ([5, 17, 300, 4, 90, 611], [1002, 1, 7, 42], [250, 251, 252, 253, 254, 12, 77, 800])
TOKENS = 48

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)


class Engine:
    """One engine and what the tests ask of it."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def tokens(self, prompts: Sequence[list[int]] = PROMPTS, count: int = TOKENS) -> list[Any]:
        """Return the greedy tokens of each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, seed=0
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = self.llm.generate(inputs, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in found]

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """Return what a function says about the model inside."""
        return self.llm.apply_model(question)[0]


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """Return `with engine(folder, quantization=…) as found`."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import vllm

    from qplug.vllm import register

    register()

    @contextmanager
    def start(folder: Path, **options: Any) -> Iterator[Engine]:
        from vllm.distributed import cleanup_dist_env_and_memory

        settings: dict[str, Any] = {
            "dtype": "float16", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8,
            "max_num_batched_tokens": 256, "skip_tokenizer_init": True, "seed": 0,
        }  # fmt: skip
        found = None
        try:
            found = Engine(vllm.LLM(str(folder), **{**settings, **options}))
            yield found
        finally:
            if found is not None:
                found.llm = None  # an old engine that goes later takes the new one's groups along
            gc.collect()
            cleanup_dist_env_and_memory()

    return start
