"""Rules of stock vLLM, on CUDA and on a CPU, by format; see `stock_vllm`."""

from __future__ import annotations

from . import compressed as ct
from . import properties as has
from .rules import Outcome, Rule

REFUSED, WRONG, RUNS, UNTESTED = Outcome.REFUSED, Outcome.WRONG, Outcome.RUNS, Outcome.UNTESTED
RUN = "run, 0.32.0 on a CPU"
OTHER_AWQ = ("awq_gemv", "awq_gemv_fast", "llm_awq")
AUTOROUND = ("autoround_gptq", "autoround_awq", "autoround")
BITSANDBYTES = ("bnb-nf4", "bnb-fp4", "bnb-int8")


def _found(keys: tuple[str, ...]) -> tuple[Rule, ...]:
    """Return the rules about a config that vLLM does not find, or finds not whole."""
    whole = Rule(
        what=f"a missing key: {', '.join(key.partition('|')[0] for key in keys)}",
        met=has.missing_key(*keys),
        outcome=REFUSED,
        source=RUN,
        repair=has.state_missing(*keys),
    )
    return (
        Rule(
            what="no block in config.json",
            met=has.in_side_file,
            outcome=REFUSED,
            source=RUN,
        ),
        Rule(
            what="no quant_method",
            met=has.without_method,
            outcome=REFUSED,
            source=RUN,
            repair=has.state_method,
        ),
        *((whole,) if keys else ()),
    )


HALF = Rule(
    what="a fused layer (qkv, gate and up) with dense and quantized parts",
    met=has.half_quantized,
    outcome=REFUSED,
    source=RUN,
)
NAMES = Rule(
    what="a Mixtral whose experts have Transformers' new names",
    met=has.unknown_names,
    outcome=REFUSED,
    source=RUN,
)

GPTQ = (
    *_found(("bits", "group_size", "desc_act", "sym")),
    Rule(
        what="desc_act is true and the group size not -1, whatever g_idx says",
        met=has.flagged_order,
        outcome=REFUSED,
        since="0.30",
        source=RUN,
        repair=has.state_order,
    ),
    Rule(
        what="bits and sym other than 4 or 8 with sym true",
        met=has.other_type,
        outcome=REFUSED,
        since="0.22",
        source=f"{RUN}; read, 0.22.1",
        repair=has.state_symmetry,
    ),
    Rule(
        what="a group size other than -1, 32, 64, 128",
        met=has.other_group,
        outcome=REFUSED,
        since="0.22",
        source=RUN,
        repair=has.state_groups,
    ),
    Rule(
        what="inputs that are no whole groups",
        met=has.cut_group,
        outcome=UNTESTED,
        until="0.22",
        source="",
    ),
    Rule(
        what="inputs that are no whole groups",
        met=has.cut_group,
        outcome=REFUSED,
        source="read, auto_gptq.py: scales of another shape",
    ),
    Rule(
        what="a rule of dynamic that does not match the name of the fused layer",
        met=has.other_reading,
        outcome=REFUSED,
        source=RUN,
    ),
    HALF,
    NAMES,
    Rule(
        what="a quantized head whose vocabulary is no multiple of 64",
        met=has.ragged_head,
        outcome=REFUSED,
        source=RUN,
    ),
    Rule(
        what="act order that desc_act denies: g_idx is not read",
        met=has.hidden_order,
        outcome=WRONG,
        source=RUN,
    ),
    Rule(
        what="sym is true and zeros are not the midpoint: zeros are not read",
        met=has.hidden_zeros,
        outcome=WRONG,
        source=RUN,
    ),
)
PLANAR = Rule(
    what="planar packing",
    met=lambda facts: "planar packing",
    outcome=UNTESTED,
    until="0.22",
    source="",
)
AWQ = (
    *_found(("bits|w_bit", "group_size|q_group_size", "zero_point")),
    Rule(
        what="scales of a KV cache beside an empty modules_to_not_convert",
        met=has.guessed_list,
        outcome=REFUSED,
        source=RUN,
        repair=has.state_list,
    ),
    Rule(
        what="an entry of modules_to_not_convert that is part of a quantized linear's name",
        met=has.skipped,
        outcome=REFUSED,
        source=RUN,
        repair=has.state_list,
    ),
    Rule(
        what="a stated group size larger than the inputs",
        met=has.other_awq_shapes,
        outcome=REFUSED,
        source=RUN,
        repair=has.state_awq_group,
    ),
    HALF,
    NAMES,
)
CPU_RUNS = Rule(what="everything else", met=has.always, outcome=RUNS, source=RUN)
CUDA_RUNS = Rule(
    what="everything else",
    met=has.always,
    outcome=RUNS,
    source="read, auto_gptq.py, auto_awq.py, inc/; gptq.py of 0.21.0",
)
CPU_ONLY = (
    Rule(
        what="bits other than 4",
        met=has.eight_bits,
        outcome=REFUSED,
        source=RUN,
    ),
    Rule(
        what="in or out features that are no multiples of 32",
        met=has.odd_sizes,
        outcome=REFUSED,
        source="read, cpu.py",
    ),
    Rule(
        what="experts: only on a CPU with AMX, computed in bfloat16",
        met=has.experts,
        outcome=UNTESTED,
        source="read, CPUExpertsInt4",
    ),
)
OTHER_AWQ_GROUPS = Rule(
    what="a group size other than -1, 32, 64, 128: the old AWQ kernels, for some shapes",
    met=has.other_awq_group,
    outcome=UNTESTED,
    source="read, auto_awq.py",
)
ODD_GROUPS = Rule(
    what="an odd group size", met=has.odd_groups, outcome=REFUSED, source="read, cpu.py"
)
UNKNOWN_METHOD = Rule(
    what="qplug's own form",
    met=lambda facts: "an unknown quant_method, qplug",
    outcome=REFUSED,
    source=RUN,
)
COMPRESSED = (
    *_found(("config_groups",)),
    Rule(
        what="actorder is group or dynamic",
        met=ct.order,
        outcome=REFUSED,
        since="0.30",
        source=RUN,
    ),
    Rule(
        what="weight_g_idx without actorder",
        met=lambda facts: None if ct.order(facts) else ct.index(facts),
        outcome=REFUSED,
        source=RUN,
    ),
    Rule(
        what="strategy: tensor",
        met=ct.tensor,
        outcome=REFUSED,
        source="read, compressed_tensors_wNa16.py",
    ),
    HALF,
    NAMES,
)
COMPRESSED_CUDA = Rule(
    what="bits and groups that Marlin does not take: Machete, Conch or humming may",
    met=ct.other_kernels,
    outcome=UNTESTED,
    source="read, kernels/linear of 0.32.0",
)
COMPRESSED_CPU = Rule(
    what="bits other than 4",
    met=ct.eight_bits,
    outcome=REFUSED,
    source=RUN,
)
COMPRESSED_RUNS = Rule(
    what="everything else",
    met=ct.scales,
    outcome=RUNS,
    source="read, compressed_tensors_wNa16.py; run, 0.32.0 on a CPU: 4 bits",
)
NOT_GEMM = (
    *_found(("bits|w_bit", "group_size|q_group_size", "zero_point")),
    Rule(
        what="another AWQ layout than GEMM: `version` is never read, and shapes differ",
        met=lambda facts: "not the GEMM layout, and `version` is never read",
        outcome=REFUSED,
        source=RUN,
    ),
)
BNB = (
    Rule(
        what="bitsandbytes, which left for vllm-bnb-plugin (one rank only)",
        met=lambda facts: "bitsandbytes is no method of it; vllm-bnb-plugin reads it, on one rank",
        outcome=REFUSED,
        since="0.28",
        source=RUN,
    ),
    *_found(()),
    HALF,
    Rule(
        what="absmax that was saved after a forward on a CPU",
        met=has.transposed_absmax,
        outcome=UNTESTED,
        source="",
    ),
    Rule(
        what="everything else",
        met=lambda facts: "",
        outcome=RUNS,
        source="read, bitsandbytes.py of 0.26.0 and 0.27.1",
    ),
)
NO_BITSANDBYTES = (
    Rule(
        what="bitsandbytes: for CUDA only, and gone from 0.28",
        met=lambda facts: "bitsandbytes is no method of it",
        outcome=REFUSED,
        source=f"{RUN}; read, 0.26.0 and 0.27.1",
    ),
)
INC = (
    Rule(
        what="AutoRound before 0.32: not looked at",
        met=lambda facts: "not looked at",
        outcome=UNTESTED,
        until="0.32",
        source="",
    ),
    *_found(("bits", "group_size", "sym")),
    HALF,
    NAMES,
)
AUTOROUND_NATIVE = Rule(
    what="packing_format auto_round or auto_round:gptqmodel",
    met=lambda facts: "an unsupported packing_format",
    outcome=REFUSED,
    source=RUN,
)
AUTOROUND_GPTQ = (
    Rule(
        what="asymmetric",
        met=has.asymmetric,
        outcome=REFUSED,
        source="read, inc_wna16_linear.py",
    ),
    Rule(
        what="bits other than 4 and 8, which need humming",
        met=has.odd_bits,
        outcome=UNTESTED,
        source="read, inc_wna16_scheme.py",
    ),
    Rule(
        what="a group size other than -1, 32, 64, 128",
        met=has.other_group,
        outcome=REFUSED,
        source="read, inc_wna16_linear.py",
    ),
)
HUMMING = (
    *_found(("bits|w_bit", "group_size|q_group_size")),
    Rule(
        what="desc_act is true",
        met=has.any_order,
        outcome=REFUSED,
        source="read, humming/schema/gptq.py",
        repair=has.state_order,
    ),
    Rule(
        what="one group per row: its shapes know no group size of -1",
        met=has.one_group,
        outcome=UNTESTED,
        source="read, humming/schema/gptq.py",
    ),
    Rule(
        what="inputs that are no whole groups",
        met=has.cut_group,
        outcome=UNTESTED,
        source="",
    ),
    HALF,
    NAMES,
    Rule(
        what="act order that desc_act denies",
        met=has.hidden_order,
        outcome=WRONG,
        source="read, humming/schema/gptq.py",
    ),
    Rule(
        what="asymmetric GPTQ v1: stored zeros are taken as they are, one too low",
        met=has.asymmetric_v1,
        outcome=WRONG,
        source="read, humming/schema/gptq.py",
    ),
    Rule(
        what="everything else",
        met=lambda facts: "as its source says, not run",
        outcome=RUNS,
        source="read, humming.py of 0.32.0 and 0.33.0",
    ),
)
NOT_LOOKED_AT = (
    Rule(
        what="everything: not looked at",
        met=lambda facts: "not looked at",
        outcome=UNTESTED,
        source="",
    ),
)
