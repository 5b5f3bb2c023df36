"""Engines in one process: vLLM is imported once, an engine takes 3 to 5 seconds."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


class Engine:
    """One engine and what the tests ask of it."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def answers(self, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[Any]:
        """Return vLLM's greedy answer to each prompt of token numbers."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = self.llm.generate(inputs, params, use_tqdm=False)
        return [answer.outputs[0] for answer in found]

    def tokens(
        self, prompts: Sequence[Sequence[int]] = PROMPTS, count: int = TOKENS
    ) -> list[list[int]]:
        """Return the greedy tokens of each prompt."""
        return [list(answer.token_ids) for answer in self.answers(prompts, count)]

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """Return what a function says about the model inside."""
        return self.llm.apply_model(question)[0]


def environment() -> dict[str, str]:
    """Return the settings, those of the environment first; vLLM reads them at import."""
    return {name: os.environ.get(name, value) for name, value in SETTINGS.items()}


@contextmanager
def start(folder: Path, **options: Any) -> Iterator[Engine]:
    """Run an engine in this process: `with start(folder, quantization=…) as engine`."""
    os.environ.update(environment())
    import torch
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    from qplug.vllm import register

    register()
    torch.set_num_threads(1)  # OpenMP read OMP_NUM_THREADS before it was set here
    settings: dict[str, Any] = {
        "dtype": "float16", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16,
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
