"""CPU time of the exact emulators of the quantised formats, against a plain fp32 product of the same matrices.

    python -m benchmarks.emulator [--seconds 0.5]

One linear layer at a time, without a bias: quantising the inputs, the product and the scales, as in the model that a
format builds. Contenders take turns within a round and the quickest turn of each counts. Each result of the int8
layers is compared with int64 sums. The ratio is the emulator's CPU
time over the plain product's; one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conditions import store
from isthmus.formats.fp8 import quantise_weight as quantise_fp8
from isthmus.formats.fp8 import scale_of_rows
from isthmus.formats.modelslim import asymmetric, quant_bias
from isthmus.formats.modelslim import quantise_weight as quantise_modelslim
from isthmus.formats.mxfp8 import power_of_two_scale
from isthmus.formats.parts.float8 import BlockLinear, full_range_scale, quantise_blocks
from isthmus.formats.parts.int8 import quantise_rows, quantise_static
from isthmus.formats.w8a8 import W8A8Linear
from isthmus.formats.w8a8_static import StaticLinear

SHAPES = [(1, 2048, 2048), (64, 2048, 2048), (512, 2048, 2048), (512, 7168, 2048)]
"""Tokens, inputs, outputs."""


def layers(weight: Tensor) -> dict[str, nn.Module]:
    """The plain layer and the emulators, by format."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    values, scale = quantise_rows(weight)
    signed, slim = quantise_modelslim(weight, torch.bfloat16)
    input_scale, offset = asymmetric(-3.0, 4.0, torch.bfloat16)
    deq_scale = input_scale * slim.flatten()
    block, factors = quantise_fp8(weight)
    micro, powers = quantise_blocks(weight, 32, power_of_two_scale)
    return {
        "fp32": plain,
        "w8a8": W8A8Linear((values.to(torch.int8), scale)),
        "w8a8_static": StaticLinear(values, scale.flatten() * (4 / 127), torch.tensor([4 / 127])),
        "modelslim": StaticLinear(signed, deq_scale, input_scale, offset, quant_bias(signed, deq_scale, offset)),
        "fp8": BlockLinear(block, scale_of_rows(factors, len(weight)), 128, full_range_scale),
        "mxfp8": BlockLinear(micro, powers, 32, power_of_two_scale),
    }


def by_int64(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What an int8 layer must give, by int64; None for other layers."""
    if isinstance(layer, W8A8Linear):
        values, scale = quantise_rows(x)
        sums = values.to(torch.int64) @ layer.weight.to(torch.int64).t()
        return sums.float() * layer.scale * scale
    if isinstance(layer, StaticLinear):
        values = quantise_static(x, layer.input_scale, layer.input_offset).to(torch.int64)
        sums = values @ layer.weight.to(torch.int64).t()
        return (sums if layer.addend is None else sums + layer.addend).float() * layer.scale
    return None


def quickest(contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """CPU seconds of the quickest turn of each."""
    best = dict.fromkeys(contenders, float("inf"))
    until = time.monotonic() + seconds * len(contenders)
    while time.monotonic() < until or float("inf") in best.values():
        for name, work in contenders.items():
            began = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - began)
    return best


def measure(tokens: int, inputs: int, outputs: int, seconds: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator)
    chosen = layers(torch.randn(outputs, inputs, generator=generator))
    few = x[:4]
    exact = {
        name: bool(torch.equal(layer(few), wanted))
        for name, layer in chosen.items()
        if (wanted := by_int64(layer, few)) is not None
    }
    assert all(exact.values()), exact
    best = quickest({name: lambda layer=layer: layer(x) for name, layer in chosen.items()}, seconds)
    shape = {"tokens": tokens, "inputs": inputs, "outputs": outputs}
    ratios = {name: round(cpu / best["fp32"], 2) for name, cpu in best.items() if name != "fp32"}
    print(f"{tokens:>5} x {inputs} x {outputs}: fp32 {best['fp32'] * 1e3:.2f} ms;", ratios)
    return {**shape, "cpu_ms": {name: cpu * 1e3 for name, cpu in best.items()}, "ratio": ratios, "equal_int64": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="wall time per contender and shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        store("emulator", {"layers": [measure(*shape, options.seconds) for shape in SHAPES]})


if __name__ == "__main__":
    main()
