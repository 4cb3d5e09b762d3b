"""How far a sparse model's residual stream is from the dense one's, after each block.

One forward pass carries both: of two equal rows of a batch, the token protocol leaves the first one dense and makes
the second one sparse, and a hook behind every block compares them. Nothing is kept from one block to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsparse.apply import protocol_of, tokens_as
from rsparse.calibrate import check_ids


@torch.no_grad()
def block_errors(model: nn.Module, ids: Tensor) -> Tensor:
    """|h' - h| / |h|, mean over positions, after every block of a sparsified model: (samples, blocks) float64.

    ids: LongTensor (samples, length), length at least 2. h and h' are the dense and the sparse residual stream of a
    position, every one of them sparse in h'; the last position of a sample, which is sparse in both, is left out.
    ValueError for a dense model, one that chooses from a dense prompt, or ids that are not token ids.
    """
    protocol, blocks = protocol_of(model), model.model.layers
    if protocol is None or protocol.prefix:
        raise ValueError("expected a sparsified model whose every position can be sparse")
    length = check_ids(ids, model, "ids").shape[1]
    if length < 2:
        raise ValueError(f"ids has rows of {length} token; expected at least 2")
    found = torch.zeros(len(ids), len(blocks), dtype=torch.float64)

    def compare(sample: int, block: int, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        dense, sparse = states[:, :-1].to(torch.promote_types(states.dtype, torch.float32))
        found[sample, block] = ((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).double().mean().cpu()

    device = model.get_input_embeddings().weight.device
    with tokens_as(model, "scored"), protocol.rows([length, length], [length, 1]):
        for sample, row in enumerate(ids):
            hooks = [
                x.register_forward_hook(lambda m, a, y, block=i, sample=sample: compare(sample, block, y))
                for i, x in enumerate(blocks)
            ]
            try:
                model.model(input_ids=torch.stack([row, row]).to(device), use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
    return found
