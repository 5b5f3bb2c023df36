"""The vLLM plugin: `--quantization qplug-awq`, `qplug-gptq` and the others of `served.METHODS`.

vLLM loads the entry point `qplug` (group `vllm.general_plugins`) in every one of its processes
and calls `register`. Nothing here may stop vLLM from serving other models, so nothing is imported
before vLLM asks, and an error is logged and remembered instead of raised; `qplug doctor` registers
in a process of its own and prints it.
"""

from __future__ import annotations

import logging

failure: BaseException | None = None
"""Why `register` failed last time; `None` if it did not."""


def register() -> None:
    """Register the quantization methods with vLLM; may be called any number of times."""
    global failure
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .config import CONFIGS

        for config in CONFIGS:
            register_quantization_config(config.name)(config)
        failure = None
    # vLLM does not catch what a plugin raises: it would stop for every model.
    except Exception as error:
        failure = error
        logging.getLogger("vllm.qplug").error(
            "qplug is not available in this vLLM (%s: %s); other models are not affected, "
            "`qplug doctor` shows this too",
            type(error).__name__,
            error,
        )
