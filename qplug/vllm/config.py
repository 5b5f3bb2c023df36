"""The quantization configs that vLLM is given: what is quantized, and how, read from headers.

The config block of a checkpoint claims; its safetensors headers decide. They are read once, in
the process that takes the command, before any weight is loaded: everything that would load wrongly
or not at all is refused there, in one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from qplug_converters import formats
from qplug_converters.checkpoint import Checkpoint, open_checkpoint
from qplug_converters.errors import QplugError, Unsupported, raise_all
from qplug_converters.format import Format
from qplug_converters.formats import (
    autoround,
    awq,
    awq_gemv,
    awq_gemv_fast,
    bnb_4bit,
    bnb_int8,
    compressed_tensors,
    gptq,
    gptq_p,
    gptq_v2,
)
from qplug_converters.layout import Holds, Layout, Part
from qplug_converters.scheme import ModelScheme, Scheme
from qplug_converters.survey import survey

from . import compat
from .compat import logger
from .served import KV_SCALE, METHODS, parameter_name, refusal

_KV_NAMES = {
    r"\.self_attn\.([qkv])_proj\.output_scale$": r".self_attn.attn.\1_scale",
    r"\.self_attn\.prob_output_scale$": ".self_attn.attn.prob_scale",
}
"""Names of KV scales that vLLM's own table lacks; patterns, since they are applied before the
renaming of `k_proj` to `qkv_proj`."""


class QplugConfig(QuantizationConfig):
    """What vLLM asks about a checkpoint; one subclass for each name of `--quantization`.

    Attributes
    ----------
    block : dict
        The config block, as vLLM found it (config.json, a side file, `--hf-overrides`).
    linears : dict
        vLLM's module name -> (name in the checkpoint, scheme), for each quantized linear.
    dense : set
        vLLM's module names of what the checkpoint holds in full precision.
    """

    name: ClassVar[str]
    quant_methods: ClassVar[tuple[str, ...]]
    formats: ClassVar[tuple[Format, ...]]

    _ignore_unexpected_suffixes = (
        *QuantizationConfig._ignore_unexpected_suffixes,
        ".prob_scale",
    )

    def __init__(self, block: Mapping[str, Any]) -> None:
        super().__init__()
        self.block = dict(block)
        self._format = self.formats[-1].name  # a name: the config is pickled to each process
        self.linears: dict[str, tuple[str, Scheme]] = {}
        self.dense: set[str] = set()

    # What vLLM asks before it has a config -----------------------------------------------------

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Answer for `--quantization <name>` with a checkpoint of ours, and never else.

        vLLM asks this for every quantized checkpoint and does not catch what is raised.
        """
        if user_quant != cls.name:
            return None
        method = hf_quant_cfg.get("quant_method") if isinstance(hf_quant_cfg, Mapping) else None
        return cls.name if str(method).lower() in cls.quant_methods else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QplugConfig:
        """Keep the block; what it means is seen together with the headers."""
        return cls(config)

    def get_name(self) -> str:
        """Return the name that `--quantization` takes."""
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of a model that can be served."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the lowest CUDA capability; dequantizing runs anywhere."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the side files of folders whose config.json has no block."""
        return ["quantize_config.json", "quant_config.json"]

    # Reading the checkpoint --------------------------------------------------------------------

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers; refuse what cannot be served.

        Raises
        ------
        ValueError
            One sentence: vLLM shows it as it is, before a process starts or a weight is read.
        """
        try:
            checkpoint = open_checkpoint(_folder(model_name, revision))
            model = self._read(checkpoint)
            raise_all(_refusals(model, self.format, checkpoint))
        except QplugError as error:
            raise ValueError(sentence(error)) from None
        self.linears = {module: (module, scheme) for module, scheme in model.linears.items()}
        self.dense = set(model.dense)
        for note in model.notes:
            logger.warning_once("qplug: %s", note)

    def _read(self, checkpoint: Checkpoint) -> ModelScheme:
        """Read the schemes under vLLM's block, which `--hf-overrides` may have replaced."""
        headers = checkpoint.headers
        self._format = next(
            (f.name for f in self.formats if f.claims(self.block, headers)), self._format
        )
        assert self.format.read is not None
        return survey(
            checkpoint, self.format, self.format.read(self.block, headers, checkpoint.peek)
        )

    @property
    def format(self) -> Format:
        """The format of the checkpoint."""
        return formats.find(self._format)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the checkpoint's modules as the model renames its tensors."""

        def renamed(module: str, tensor: str) -> str:
            name = hf_to_vllm_mapper.apply_list([f"{module}.{tensor}"])
            return name[0].removesuffix(f".{tensor}") if name else module

        self.linears = {renamed(name, "qweight"): found for name, found in self.linears.items()}
        self.dense = {renamed(name, "weight") for name in self.dense}

    # Which method a layer gets -----------------------------------------------------------------

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer, from what the checkpoint holds for it.

        Raises
        ------
        ValueError
            If the layer cannot be served as the checkpoint holds it.
        """
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .kv import kv_method
        from .linear import QplugLinearMethod, Shard

        if isinstance(layer, LinearBase):
            shards = self.shards(prefix)
            if not shards:
                return UnquantizedLinearMethod()
            if (ranks := compat.tensor_parallel_size()) > 1:
                raise ValueError(
                    f"qplug: {prefix}: tensor parallel {ranks} is not served yet; "
                    "use --tensor-parallel-size 1"
                )
            return QplugLinearMethod([Shard(m, s, self.layout(s)) for m, s in shards])
        if isinstance(layer, Attention):
            return kv_method(self, layer)
        inside = [name for name in self.linears if name == prefix or name.startswith(f"{prefix}.")]
        if inside:
            kind = "experts" if isinstance(layer, RoutedExperts) else type(layer).__name__
            raise ValueError(f"qplug: {inside[0]}: quantized {kind} are not served yet")
        return None

    def layout(self, scheme: Scheme) -> Layout:
        """Return the tensors to load: those that say something."""
        return Layout(tuple(part for part in self.format.layout(scheme) if self._tells(part)))

    def _tells(self, part: Part) -> bool:
        """Whether a part is to be loaded: no constant, and no `g_idx` where all are in order."""
        if part.holds is Holds.G_IDX:
            return any(scheme.act_order for _, scheme in self.linears.values())
        return part.holds is not Holds.CONSTANT

    def shards(self, prefix: str) -> list[tuple[str, Scheme]]:
        """Return the quantized linears of the checkpoint that make up a layer, in its order.

        Empty for a layer in full precision. Names match as whole dotted components, and a fused
        layer shard by shard.

        Raises
        ------
        ValueError
            If the shards of a fused layer do not agree, or the checkpoint lost the layer.
        """
        names = self._names(prefix)
        found = [self.linears[name] for name in names if name in self.linears]
        if not found:
            for name in names:
                if name not in self.dense and self._has_sibling(name):
                    raise ValueError(
                        f"qplug: {name}: found no weight, quantized or not, expected a linear "
                        "like that of the other layers"
                    )
            return []
        if len(found) < len(names):
            left = next(name for name in names if name not in self.linears)
            raise ValueError(
                f"qplug: {prefix}: found {found[0][0]} quantized and {left} not, expected all "
                "shards of a fused layer alike"
            )
        first, scheme = found[0]
        for module, other in found[1:]:
            if other.in_features != scheme.in_features:
                raise ValueError(
                    f"qplug: {prefix}: found {first} with {scheme.in_features} inputs and {module} "
                    f"with {other.in_features}, expected all shards of a fused layer alike"
                )
        return found

    def _names(self, prefix: str) -> list[str]:
        """Return the names, in vLLM's terms, of the checkpoint's linears that a layer fuses."""
        if prefix in self.linears or prefix in self.dense:
            return [prefix]
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{shard}" for shard in self.packed_modules_mapping.get(last, [last])]

    def _has_sibling(self, name: str) -> bool:
        """Whether the same linear of another layer is quantized."""
        return _pattern(name) in {_pattern(other) for other in self.linears}

    # Names of tensors --------------------------------------------------------------------------

    def get_cache_scale_mapper(self) -> Any:
        """Return how the names of KV scales in checkpoints become vLLM's."""
        import regex  # what vLLM's own patterns are made with

        ours = compat.mapped(regex={regex.compile(k): v for k, v in _KV_NAMES.items()})
        ours = ours | QuantizationConfig.get_cache_scale_mapper()
        return ours if compat.HAS_CHECKPOINT_MAPPER else ours | self.get_checkpoint_weight_mapper()

    def get_checkpoint_weight_mapper(self) -> Any:
        """Return the tensors to drop, which say nothing, and those that no layer can call so."""
        schemes = [scheme for _, scheme in self.linears.values()]
        parts = {part.name: part for s in schemes for part in self.format.layout(s)}
        names = {
            name: parameter_name(name) if self._tells(part) else None
            for name, part in parts.items()
        }
        return compat.mapped(
            suffix={f".{a}": b if b is None else f".{b}" for a, b in names.items() if a != b}
        )


def _pattern(module: str) -> str:
    """Return a name without the numbers of its layers."""
    return re.sub(r"\d+", "#", module)


def sentence(error: QplugError) -> str:
    """Return an error as vLLM is to show it."""
    return f"qplug: {error}" + (f"; {error.fix}" if error.fix else "")


def _folder(model: str, revision: str | None) -> Path:
    """Return the local folder of a model, which may be a name in the Hub's local cache.

    Raises
    ------
    QplugError
        If it is not on this machine.
    """
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json"]
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        raise QplugError(
            "not on this machine, and the headers are read before anything is served",
            model,
            fix=f"download it first: hf download {model}",
        ) from None


def _refusals(model: ModelScheme, known: Format, checkpoint: Checkpoint) -> list[QplugError]:
    """Return everything that would not be served, or wrongly, as one problem each."""
    problems: list[QplugError] = []
    for module, scheme in model.linears.items():
        if reason := refusal(module, scheme):
            problems.append(Unsupported(reason, module))
    biased = {module for module in model.linears if f"{module}.bias" in checkpoint.headers}
    expected = {_pattern(module) for module in biased}
    for module in model.linears:
        if _pattern(module) in expected and module not in biased:
            missing = QplugError("no such tensor", f"{module}.bias", "one, as in the other layers")
            problems.append(missing)
    parts = {
        module: {part.name for part in known.layout(scheme)}
        for module, scheme in model.linears.items()
    }
    stored = {name for names in parts.values() for name in names} - {"weight"}
    for tensor, spec in checkpoint.headers.items():
        module, _, name = tensor.rpartition(".")
        if module in parts and name not in (*parts[module], "bias") and not KV_SCALE.match(name):
            problems.append(QplugError(str(spec), tensor, "no such tensor in a quantized linear"))
        elif name in stored and module not in parts:
            problems.append(QplugError(str(spec), tensor, "the codes of a linear beside it"))
    return problems


class AWQConfig(QplugConfig):
    """`--quantization qplug-awq`: every layout that `version` names."""

    name = METHODS["awq"]
    quant_methods = ("awq",)
    formats = (awq_gemv.FORMAT, awq_gemv_fast.FORMAT, awq_gemv_fast.LLM_AWQ, awq.FORMAT)


class GPTQConfig(QplugConfig):
    """`--quantization qplug-gptq`: `checkpoint_format` gptq, gptq_v2 or gptq_p."""

    name = METHODS["gptq"]
    quant_methods = ("gptq",)
    formats = (gptq_v2.FORMAT, gptq_p.FORMAT, gptq.FORMAT)


class AutoRoundConfig(QplugConfig):
    """`--quantization qplug-auto-round`: the three packings for weights alone."""

    name = METHODS["autoround"]
    quant_methods = autoround.METHODS
    formats = (autoround.FORMAT, autoround.AWQ, autoround.GPTQ)


class BitsAndBytesConfig(QplugConfig):
    """`--quantization qplug-bitsandbytes`: NF4, FP4, and LLM.int8 as weights alone."""

    name = METHODS["bnb-nf4"]
    quant_methods = ("bitsandbytes",)
    formats = (bnb_4bit.FP4, bnb_int8.FORMAT, bnb_4bit.NF4)


class CompressedTensorsConfig(QplugConfig):
    """`--quantization qplug-compressed-tensors`: pack-quantized."""

    name = METHODS["compressed-tensors"]
    quant_methods = ("compressed-tensors",)
    formats = (compressed_tensors.FORMAT,)


CONFIGS: tuple[type[QplugConfig], ...] = (
    AWQConfig,
    GPTQConfig,
    AutoRoundConfig,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
)
