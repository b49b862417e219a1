"""A tiny model as a server keeps one: fused and padded parameters, cut among ranks, packed after loading."""

from __future__ import annotations

import functools

import torch
from torch import nn

from isthmus.engines.vllm_plugin.standing import Standing

WIDTH, HEADS, INNER, EXPERTS, PADDED = 8, 4, 6, 4, 16


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """What a trainer publishes: one tensor each for q, k, v, and for gate, up and down of every expert."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    found = {f"layer.{part}_proj.weight": drawn(WIDTH, WIDTH) for part in "qkv"}
    for expert in range(EXPERTS):
        for part, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            found[f"layer.experts.{expert}.{part}_proj.weight"] = drawn(*shape)
    return found | {"norm.weight": drawn(WIDTH), "mtp.weight": drawn(WIDTH)}


def computed(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What the model computes, from the checkpoint's own tensors."""
    w = {name: tensor.float() for name, tensor in tensors.items()}
    q, k, v = (x @ w[f"layer.{part}_proj.weight"].T for part in "qkv")
    x = q * k + v
    for expert in range(EXPERTS):
        gate, up, down = (w[f"layer.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + (torch.tanh(x @ gate.T) * (x @ up.T)) @ down.T
    return x * w["norm.weight"]


class Kernel:
    """An object that an engine makes of loaded weights, and keeps apart from them."""

    def __init__(self, packed: torch.Tensor):
        self.packed = packed


class Method:
    """As vLLM's quant_method: a plain object of a layer, which holds the kernel once there is one."""

    kernel: Kernel | None = None


class Fused(nn.Module):
    """q, k and v as one parameter with rows of padding, of which a rank has its part of the rows of each."""

    def __init__(self, rank: int, ranks: int):
        super().__init__()
        self.rows = WIDTH // ranks
        self.rank = rank
        self.weight = nn.Parameter(torch.zeros(3 * self.rows + 2, WIDTH, dtype=torch.bfloat16), requires_grad=False)
        self.linear = None

    def load(self, place: int, tensor: torch.Tensor) -> None:
        own = tensor.narrow(0, self.rank * self.rows, self.rows)
        self.weight.data.narrow(0, place * self.rows, self.rows).copy_(own)

    def finish(self) -> None:
        packed = self.weight.data.float().T.contiguous()
        self.linear = lambda x: x @ packed


class Experts(nn.Module):
    """Gate and up in one parameter, padded, transposed by the kernel that is made of them at the end."""

    def __init__(self) -> None:
        super().__init__()
        shape = (EXPERTS, 2 * PADDED, WIDTH)
        self.w13 = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)
        self.w2 = nn.Parameter(torch.zeros(EXPERTS, WIDTH, PADDED, dtype=torch.bfloat16), requires_grad=False)
        self.method = Method()

    def load(self, expert: int, part: str, tensor: torch.Tensor) -> None:
        if part == "down":
            self.w2.data[expert, :, :INNER].copy_(tensor)
        else:
            start = 0 if part == "gate" else PADDED
            self.w13.data[expert, start : start + INNER].copy_(tensor)

    def finish(self) -> None:
        """Like vLLM's for experts: what is done the first time is not done again."""
        if self.method.kernel is None:
            self.w13 = nn.Parameter(self.w13.data.transpose(1, 2).contiguous(), requires_grad=False)
            self.method.kernel = Kernel(self.w2.data.transpose(1, 2).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.method.kernel is not None
        for expert in range(EXPERTS):
            gate, up = self.w13[expert].float().split(PADDED, dim=-1)
            x = x + (torch.tanh(x @ gate) * (x @ up)) @ self.method.kernel.packed[expert].float()
        return x


class Toy(nn.Module):
    """The model of one rank; `forward` is that of a single one."""

    def __init__(self, rank: int = 0, ranks: int = 1):
        super().__init__()
        self.layer = Fused(rank, ranks)
        self.experts = Experts()
        self.norm = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16), requires_grad=False)
        self.norm_too = self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.layer.linear is not None
        q, k, v = self.layer.linear(x)[..., : 3 * WIDTH].chunk(3, -1)
        return self.experts(q * k + v) * self.norm_too.float()


class ToyMake:
    """Loaders of all sorts; `meddle` may change what they are given."""

    def __init__(self, rank: int = 0, ranks: int = 1):
        self.rank, self.ranks = rank, ranks
        self.meddle = lambda _name, tensor: tensor

    def build(self) -> Toy:
        return Toy(self.rank, self.ranks)

    def load(self, model, tensors) -> None:
        for name, tensor in tensors:
            tensor, parts = self.meddle(name, tensor), name.split(".")
            if tensor is None or name == "mtp.weight":
                continue
            if name == "norm.weight":
                model.norm.data.copy_(tensor)
            elif parts[1] == "experts":
                model.experts.load(int(parts[2]), parts[3].removesuffix("_proj"), tensor)
            else:
                model.layer.load("qkv".index(parts[1][0]), tensor)

    def finish(self, model) -> None:
        model.layer.finish()
        model.experts.finish()


@functools.cache
def seen() -> torch.Tensor:
    """States that the models are asked for."""
    return torch.randn((5, WIDTH), generator=torch.Generator().manual_seed(7))


def standing(rank: int = 0, ranks: int = 1, *, graphs: bool = False) -> Standing:
    """An engine that serves the checkpoint of seed 0."""
    make = ToyMake(rank, ranks)
    live = make.build()
    make.load(live, checkpoint(0).items())
    make.finish(live)
    return Standing(live, make, graphs=graphs)
