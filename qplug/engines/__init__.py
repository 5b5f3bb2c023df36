"""Which engine takes which checkpoint, by version: a table as data, and who goes through it.

`facts.py` holds what engines go by, `properties.py` and `compressed.py` what rules ask for,
`vllm_rules.py`, `stock_vllm.py`, `stock_transformers.py` and `with_qplug.py` the rules, `rules.py`
the judge. Of a format without rules nothing is claimed. `docs/engines.md` is written from here.
Nothing here imports an engine, or torch.
"""

from .facts import Facts, of_checkpoint, of_config, of_converted
from .rules import Answer, Engine, Outcome, Rule, Version, judge, judge_at, repairs, shown, version
from .stock_transformers import TRANSFORMERS
from .stock_vllm import VLLM, VLLM_CPU, VLLM_HUMMING
from .with_qplug import TRANSFORMERS_QPLUG, VLLM_QPLUG

ENGINES = (VLLM, VLLM_CPU, VLLM_HUMMING, VLLM_QPLUG, TRANSFORMERS, TRANSFORMERS_QPLUG)
"""Every engine, in the order of tables."""

__all__ = [
    "ENGINES", "TRANSFORMERS", "TRANSFORMERS_QPLUG", "VLLM", "VLLM_CPU", "VLLM_HUMMING",
    "VLLM_QPLUG", "Answer", "Engine", "Facts", "Outcome", "Rule", "Version", "judge", "judge_at",
    "of_checkpoint", "of_config", "of_converted", "repairs", "shown", "version",
]  # fmt: skip
