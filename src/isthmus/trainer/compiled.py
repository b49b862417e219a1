"""torch.compile for the parts of a model whose graphs hold for every batch: norms, projections, MLPs, routers.

Attention within documents and the products of the experts depend on lengths and counts that differ at each step: they
would be compiled again and again.
"""

from __future__ import annotations

from isthmus.model.attention import LatentAttention, RMSNorm
from isthmus.model.model import Model
from isthmus.model.moe import GatedMlp, Router


def compile_parts(model: Model) -> None:
    """Compile in place, for any number of tokens. From then on, torch raises where it would give up and run eagerly."""
    import torch._dynamo

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        if isinstance(module, RMSNorm | GatedMlp | Router):
            module.compile(dynamic=True)
        elif isinstance(module, LatentAttention):
            module.queries = torch.compile(module.queries, dynamic=True)
            module.latents = torch.compile(module.latents, dynamic=True)
