"""Where the time of a training step goes, by a device's published rates: computing, memory, links, starting kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from isthmus.forecast.setting import Setting

# Chosen together, so that whole models, chips, families and precisions left out of the published results are predicted
# best (`isthmus forecast validate`). Shares of a dense peak that matrix products reach at best:
DENSE_COMPUTE, MIXTURE_COMPUTE = 0.22, 0.35
# Bytes of the residual stream's width that a layer moves per token, forward and backward: 48 times this.
DENSE_MEMORY, MIXTURE_MEMORY = 4.0, 0.5
# Parts of the traffic that computing does not hide: expert exchange, tensor parallelism, gradients and weights.
EXPERT_LINKS, TENSOR_LINKS, DATA_LINKS = 0.70, 8.0, 0.031
# Milliseconds in which a layer's kernels of one microbatch start.
DENSE_START_MS, MIXTURE_START_MS = 0.1, 0.46
# How many times its ideal bubble a pipeline costs, for stages are uneven and wait for what is sent; and what computing
# layers again adds to a step beside what the regression finds.
BUBBLE, RECOMPUTE = 2.6, 0.05
NODE_DEDUPLICATION = 2.5
"""By how much less crosses between nodes when a token goes once to each node: DeepSeek-V3's limit of 4 nodes for 8
experts, and shared experts of a node beyond it."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds per token and device. They add up: what is hidden is already out."""

    compute: float
    memory: float
    expert_links: float
    tensor_links: float
    data_links: float
    start: float
    bubble: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def links(self) -> float:
        return self.expert_links + self.tensor_links + self.data_links


def step_times(setting: Setting) -> StepTimes:
    """The parts of a training step's time in a setting whose device is complete."""
    model, device = setting.model, setting.device
    assert device.bf16_tflops and device.mem_bw_gbs and device.link_gbs and device.nic_gbs
    mixture = model.is_mixture
    compute = model.matrix_flops() / setting.peak + model.attention_flops(setting.length) / (device.bf16_tflops * 1e12)
    compute /= MIXTURE_COMPUTE if mixture else DENSE_COMPUTE
    compute *= 1.0 + RECOMPUTE * setting.checkpointing
    tensor, context = setting.tensor or 1.0, setting.context or 1.0
    start = 1e-3 * (MIXTURE_START_MS if mixture else DENSE_START_MS)
    start *= model.layers * tensor * context / (microbatch_rows(setting) * setting.length)
    busy = StepTimes(
        compute=compute,
        memory=_memory(setting),
        expert_links=_expert_links(setting),
        tensor_links=_tensor_links(setting),
        data_links=_data_links(setting),
        start=start,
        bubble=0.0,
    )
    return StepTimes(
        **{
            **{field.name: getattr(busy, field.name) for field in fields(busy)},
            "bubble": busy.total * BUBBLE * _bubble(setting),
        }
    )


def microbatch_rows(setting: Setting) -> float:
    """Rows that a group of devices computes at once: as stated, else from the batch and its accumulation."""
    if setting.microbatch:
        return setting.microbatch
    rows = (setting.batch_rows or 0.0) / _replicas(setting)
    if rows and setting.accumulation:
        return rows / setting.accumulation
    return max(1.0, min(2.0, rows)) if rows and not setting.pipeline else 1.0


def _replicas(setting: Setting) -> float:
    """Groups of devices that each compute rows of their own."""
    used = (setting.pipeline or 1.0) * (setting.tensor or 1.0) * (setting.context or 1.0)
    return max(1.0, setting.count / used)


def _memory(setting: Setting) -> float:
    model = setting.model
    assert setting.device.mem_bw_gbs and setting.device.bf16_tflops
    widths = 24.0 + 8.0 * model.experts_per_token * model.sparse_share
    narrow = math.log2(setting.peak / (setting.device.bf16_tflops * 1e12))
    factor = (MIXTURE_MEMORY if model.is_mixture else DENSE_MEMORY) * (1.0 + narrow)
    return factor * model.layers * model.hidden * 2.0 * widths / (setting.device.mem_bw_gbs * 1e9)


def _expert_links(setting: Setting) -> float:
    """Dispatch and combine, forward and backward, 2 bytes a value; over the network, once per node."""
    model, device = setting.model, setting.device
    assert device.link_gbs and device.nic_gbs
    spread = setting.expert or (min(setting.count, 64.0) if model.is_mixture else 1.0)
    inside = spread * (setting.tensor or 1.0) <= device.domain
    rate = device.link_gbs * 1e9 if inside else device.nic_gbs * 1e9 * NODE_DEDUPLICATION
    sent = model.layers * model.experts_per_token * model.sparse_share * model.hidden * 2.0 * 4.0
    return EXPERT_LINKS * sent * (1.0 - 1.0 / spread) / rate


def _tensor_links(setting: Setting) -> float:
    device, tensor = setting.device, setting.tensor or 1.0
    assert device.link_gbs and device.nic_gbs
    rate = (device.link_gbs if tensor <= device.domain else device.nic_gbs) * 1e9
    return TENSOR_LINKS * 8.0 * setting.model.layers * setting.model.hidden * 2.0 * (tensor - 1.0) / rate


def _data_links(setting: Setting) -> float:
    """Gradients reduced, and weights gathered, once an update: 6 bytes a parameter that a device is responsible for."""
    model, device, count = setting.model, setting.device, setting.count
    assert device.link_gbs and device.nic_gbs
    held = 1.0 if setting.sharded else (setting.tensor or 1.0) * (setting.pipeline or 1.0)
    if model.is_mixture and not setting.sharded:
        held *= min(count, 64.0)
    tokens = setting.batch_rows * setting.row_length / count if setting.batch_rows and setting.row_length else 65536.0
    rate = (device.link_gbs if count <= device.domain else device.nic_gbs) * 1e9
    return DATA_LINKS * 6.0 * model.total / held / tokens / rate


def _bubble(setting: Setting) -> float:
    """Idle share of a pipeline: (stages - 1) / (virtual stages x microbatches)."""
    pipeline = setting.pipeline or 1.0
    rows = microbatch_rows(setting)
    batch = setting.batch_rows or _replicas(setting) * rows * 8.0
    microbatches = max(1.0, batch / _replicas(setting) / rows)
    return (pipeline - 1.0) / (setting.stages_per_rank or 1.0) / microbatches
