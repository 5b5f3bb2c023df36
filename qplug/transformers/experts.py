"""Mixtures of experts: Transformers 5 fuses them into 3-D weights, quantized files do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qplug_converters.codec import round_to

from .linear import QuantLinear


class QuantExperts(nn.Module):
    """Experts of three quantized linears each, in place of a model's fused ones.

    The linears lie where the checkpoint's names put them, below the number of the expert.

    Parameters
    ----------
    fused
        The module replaced; its activation and gating are used, its weights are not.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        # In a tuple: it is no submodule, and its meta weights must not be found by the loader.
        self._fused: tuple[Any] = (fused,)
        self.num_experts: int = fused.gate_up_proj.shape[0]  # type: ignore[index,assignment]
        self.roles: dict[tuple[int, str], str] = {}
        self._is_hf_initialized = True

    def add(self, number: int, role: str, name: str, linear: QuantLinear) -> None:
        """Put the `role` (gate, up or down) of an expert at `<number>.<name>`."""
        if str(number) not in self._modules:
            self.add_module(str(number), nn.Module())
        self.get_submodule(str(number)).add_module(name, linear)
        self.roles[number, role] = f"{number}.{name}"

    def linear(self, number: int, role: str) -> QuantLinear:
        """Return one linear of one expert."""
        found = self.get_submodule(self.roles[number, role])
        assert isinstance(found, QuantLinear)
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute as the fused module's own loop does, expert by expert."""
        fused = self._fused[0]
        result = torch.zeros_like(hidden_states)
        for number in sorted(set(top_k_index.flatten().tolist())):
            if number >= self.num_experts:  # Transformers' mark for "no expert"
                continue
            token, place = torch.where(top_k_index == number)
            state = hidden_states[token]
            gate, up = self.linear(number, "gate")(state), self.linear(number, "up")(state)
            state = self.linear(number, "down")(fused._apply_gate(torch.cat((gate, up), -1)))
            state = state * top_k_weights[token, place, None]
            result.index_add_(0, token, state.to(result.dtype))
        return result

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """Return the fused module with the dequantized weights."""

        def stack(*roles: str) -> nn.Parameter:
            experts = (
                torch.cat([self.linear(number, role).dequantize() for role in roles])
                for number in range(self.num_experts)
            )
            return nn.Parameter(torch.stack([round_to(expert, dtype) for expert in experts]))

        fused: nn.Module = self._fused[0]
        fused.gate_up_proj = stack("gate", "up")
        fused.down_proj = stack("down")
        return fused
