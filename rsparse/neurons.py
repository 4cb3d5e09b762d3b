"""Neurons switched off one token at a time: the activation of an MLP with zeros where a neuron's score is small.

down(act(gate(x)) * up(x)) reads neither row j of up nor column j of down where act(gate(x))_j is zero; gate is read
densely, because it decides. That is CATS, CHESS and ReLUfication, which differ in the score and in the function.
"""

from __future__ import annotations

from torch import Tensor, nn

from rsparse.accounting import Split
from rsparse.linears import Masked
from rsparse.protocol import TokenProtocol


class SparseActivation(Masked):
    """act(g) with zeros in the neurons that sparse positions switch off.

    dense: the MLP's own activation, which dense positions use. function: that of sparse positions, where it is
    another (ReLU). The other arguments are those of `Masked`; the score is taken of function(g).
    """

    def __init__(
        self,
        dense: nn.Module,
        split: Split,
        protocol: TokenProtocol,
        norms: Tensor | None = None,
        threshold: float | None = None,
        function: nn.Module | None = None,
    ):
        super().__init__(dense, split, protocol, norms, threshold)
        self.function = function or dense

    def scored(self, g: Tensor) -> Tensor:
        return self.function.forward(g)  # past the hooks that collect g

    def forward(self, g: Tensor) -> Tensor:
        """g, the output of gate, (rows, positions, neurons) -> the same shape."""
        if self.idle:
            return self.dense(g)
        a = self.masked(self.function(g))
        sparse = self.protocol.on(g.device)
        if self.function is self.dense or sparse is None:
            return a
        return a.where(sparse[..., None], self.dense(g))
