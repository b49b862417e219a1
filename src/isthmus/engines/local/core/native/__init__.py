"""Decoder layers in C for few tokens at a time, where a hundred small operations cost more than their arithmetic.

`kernels.c` is compiled once per machine with the system's C compiler and kept in the user's cache folder. It computes
fp32 and emulated W8A8 on the CPU. Everything else, and machines without a compiler, take the torch path, which defines
what it must equal.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus.engines.local.core.batch import StepBatch
from isthmus.formats.w8a8 import W8A8Experts, W8A8GatedMlp, W8A8Linear
from isthmus.model.attention import LatentAttention, RMSNorm
from isthmus.model.dense import GroupedQueryAttention
from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model
from isthmus.model.moe import Experts, GatedMlp, MixtureOfExperts

SOURCE = Path(__file__).parent / "kernels.c"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
COMPILE_TIMEOUT_S = 120.0
DIGEST = ".sha256"


class NativeUnavailable(Exception):
    """Why the compiled layers cannot be used here."""


class _Linear(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float)]


class _Mlp(ctypes.Structure):
    _fields_ = [("gate", _Linear), ("up", _Linear), ("down", _Linear)]


class _Layer(ctypes.Structure):
    """`Layer` of kernels.c."""

    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in ("latent", "heads", "kv_heads", "nope", "rope", "value", "rank", "window")
        ],
        ("scale", ctypes.c_float),
        *[(name, _Norm) for name in ("input_norm", "q_norm", "kv_norm", "post_norm")],
        *[(name, _Linear) for name in ("q_a", "q", "k", "v", "kv_a", "output")],
        *[(name, ctypes.c_void_p) for name in ("up_key", "up_value")],
        *[(name, ctypes.c_int32) for name in ("experts", "top_k", "groups", "top_groups", "softmax", "normalise")],
        ("routed_scale", ctypes.c_float),
        *[
            (name, ctypes.c_void_p)
            for name in ("router", "router_bias", "gate_up", "down", "gate_up_scale", "down_scale")
        ],
        ("expert_width", ctypes.c_int64),
        ("mlp", _Mlp),
    ]


class _Pass(ctypes.Structure):
    """`Pass` of kernels.c."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("tokens", "hidden", "block_size", "table_width")],
        *[(name, ctypes.c_void_p) for name in ("places", "lengths", "tables", "cos", "sin")],
        ("threads", ctypes.c_int32),
        ("route_width", ctypes.c_int32),
        ("routes", ctypes.c_void_p),
    ]


class NativeModel:
    """The layers and the output head of a model, by reference. Raises NativeUnavailable if it is not of the kind."""

    def __init__(self, model: Model, block_size: int, threads: int):
        self._library = load_library()
        self._kept: list[Tensor] = []
        self.block_size, self.threads = block_size, threads
        self._rotary, self._embedding = model.model.rotary, model.model.embed_tokens
        self._hidden = model.architecture.hidden_size
        layers = [self._layer(layer) for layer in model.model.layers]
        self._layers = (_Layer * len(layers))(*layers)
        self._depth = model.architecture.num_hidden_layers
        self._norm, self._no_norm = self._norm_of(model.model.norm), _Norm()
        self._head, self._vocab = self._address(model.lm_head.weight), model.architecture.vocab_size

    def hidden(self, batch: StepBatch, stores: list[Tensor], routes: NDArray[np.int16] | None = None) -> Tensor:
        """States [N, D] before the final norm. The experts of each token are noted in `routes` [places, L * K]."""
        x = self._embedding(batch.tokens)
        return self._run(x, batch, 0, stores[: self._depth], routes)

    def last_layer(self, x: Tensor, batch: StepBatch, store: Tensor) -> Tensor:
        """x [N, D] through the layer of multi-token prediction."""
        return self._run(x.contiguous(), batch, self._depth, [store])

    def logits(self, states: Tensor, normed: bool) -> Tensor:
        """Logits [N, V] of states [N, D]; `normed` ones have passed a final norm."""
        states = states.contiguous()
        out = torch.empty(len(states), self._vocab)
        norm = self._no_norm if normed else self._norm
        sizes = len(states), self._hidden, self._vocab
        failed = self._library.isthmus_head(
            ctypes.byref(norm), self._head, states.data_ptr(), *sizes, out.data_ptr(), self.threads
        )
        _check(failed)
        return out

    def _run(
        self,
        x: Tensor,
        batch: StepBatch,
        first: int,
        stores: list[Tensor],
        routes: NDArray[np.int16] | None = None,
    ) -> Tensor:
        rotation = self._rotary(batch.positions)
        lengths, tables = batch.position_ids + 1, batch.tables
        addresses = (ctypes.c_void_p * len(stores))(*(store.data_ptr() for store in stores))
        sizes = len(batch), self._hidden, self.block_size, tables.shape[1]
        arrays = (array.ctypes.data for array in (batch.place_ids, lengths, tables))
        noted = (0, None) if routes is None else (routes.shape[1], routes.ctypes.data)
        one_pass = _Pass(*sizes, *arrays, rotation.cos.data_ptr(), rotation.sin.data_ptr(), self.threads, *noted)
        layer = ctypes.byref(self._layers, first * ctypes.sizeof(_Layer))
        failed = self._library.isthmus_layers(layer, len(stores), ctypes.byref(one_pass), addresses, x.data_ptr())
        _check(failed)
        return x

    def _layer(self, layer: nn.Module) -> _Layer:
        _require(isinstance(layer, ResidualLayer), f"a {type(layer).__name__}")
        assert isinstance(layer, ResidualLayer)
        native = _Layer()
        native.input_norm = self._norm_of(layer.input_layernorm)
        native.post_norm = self._norm_of(layer.post_attention_layernorm)
        attention, mlp = layer.self_attn, layer.mlp
        if isinstance(attention, LatentAttention):
            self._set_latent(native, attention)
        else:
            self._set_grouped(native, attention)
        if isinstance(mlp, MixtureOfExperts):
            self._set_experts(native, mlp)
        else:
            native.mlp = self._mlp(mlp)
        return native

    def _set_latent(self, native: _Layer, attention: LatentAttention) -> None:
        a = attention
        native.latent, native.heads, native.kv_heads = 1, a.num_heads, 1
        native.nope, native.rope, native.value, native.rank, native.scale = a.nope, a.rope, a.v_dim, a.rank, a.scale
        if a.compressed_q:
            native.q_a, native.q = self._linear(a.q_a_proj), self._linear(a.q_b_proj)
            native.q_norm = self._norm_of(a.q_a_layernorm)
        else:
            native.q = self._linear(a.q_proj)
        native.kv_a, native.kv_norm = self._linear(a.kv_a_proj_with_mqa), self._norm_of(a.kv_a_layernorm)
        native.output = self._linear(a.o_proj)
        self._linear(a.kv_b_proj)
        up_key, up_value = a.up_projections()
        native.up_key = self._address(up_key.transpose(1, 2).contiguous())
        native.up_value = self._address(up_value.transpose(1, 2).contiguous())

    def _set_grouped(self, native: _Layer, attention: nn.Module) -> None:
        _require(isinstance(attention, GroupedQueryAttention), f"a {type(attention).__name__}")
        assert isinstance(attention, GroupedQueryAttention)
        a = attention
        native.latent, native.heads, native.kv_heads = 0, a.num_heads, a.num_kv_heads
        native.value, native.scale, native.window = a.head_size, a.scale, a.layout.window or 0
        if a.q_norm is not None and a.k_norm is not None:
            native.q_norm, native.kv_norm = self._norm_of(a.q_norm), self._norm_of(a.k_norm)
        for name, projection in (("q", a.q_proj), ("k", a.k_proj), ("v", a.v_proj), ("output", a.o_proj)):
            setattr(native, name, self._linear(projection))

    def _set_experts(self, native: _Layer, mixture: MixtureOfExperts) -> None:
        gate, experts = mixture.gate, mixture.experts
        native.experts, native.top_k = mixture.num_experts, gate.top_k
        native.groups, native.top_groups = gate.n_group, gate.topk_group
        native.softmax, native.normalise, native.routed_scale = int(gate.softmax), int(gate.normalise), gate.scaling
        native.router = self._address(gate.weight)
        if gate.e_score_correction_bias is not None:
            native.router_bias = self._address(gate.e_score_correction_bias)
        whole = isinstance(experts, W8A8Experts) or (
            isinstance(experts, Experts) and experts.total == len(experts.down)
        )
        _require(whole, f"a {type(experts).__name__}")
        _require(experts.limit is None, "experts with a clamp")
        if isinstance(experts, W8A8Experts):
            native.gate_up_scale = self._address(experts.gate_up_scale)
            native.down_scale = self._address(experts.down_scale)
        native.gate_up, native.down = self._address(experts.gate_up), self._address(experts.down)
        native.expert_width = experts.down.shape[-1]
        if mixture.shared_experts is not None:
            native.mlp = self._mlp(mixture.shared_experts)

    def _mlp(self, mlp: nn.Module) -> _Mlp:
        _require(getattr(mlp, "limit", None) is None, "an MLP with a clamp")
        if isinstance(mlp, W8A8GatedMlp):
            joined, down = self._linear(mlp.gate_up), self._linear(mlp.down)
            width = joined.outputs // 2
            gate = _Linear(joined.weight, joined.scale, None, joined.inputs, width)
            weight, scale = mlp.gate_up.weight[width:], mlp.gate_up.scale[width:]
            return _Mlp(gate, _Linear(weight.data_ptr(), scale.data_ptr(), None, joined.inputs, width), down)
        _require(isinstance(mlp, GatedMlp), f"a {type(mlp).__name__}")
        assert isinstance(mlp, GatedMlp)
        return _Mlp(self._linear(mlp.gate_proj), self._linear(mlp.up_proj), self._linear(mlp.down_proj))

    def _linear(self, linear: nn.Module) -> _Linear:
        _require(isinstance(linear, nn.Linear | W8A8Linear), f"a {type(linear).__name__}")
        assert isinstance(linear, nn.Linear | W8A8Linear)
        scale = self._address(linear.scale) if isinstance(linear, W8A8Linear) else None
        bias = None if linear.bias is None else self._address(linear.bias)
        outputs, inputs = linear.weight.shape
        return _Linear(self._address(linear.weight), scale, bias, inputs, outputs)

    def _norm_of(self, norm: nn.Module) -> _Norm:
        assert isinstance(norm, RMSNorm)
        return _Norm(self._address(norm.weight), norm.eps)

    def _address(self, tensor: Tensor) -> int:
        plain = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
        _require(plain, f"a tensor in {tensor.dtype} on {tensor.device}")
        self._kept.append(tensor)
        return tensor.data_ptr()


def load_library() -> ctypes.CDLL:
    """The compiled kernels. Raises NativeUnavailable with its compiler's or loader's words if they cannot be had.

    What came of it the first time holds for the process: a compiler that fails is not asked at every change of weights.
    """
    found = tried_library()
    if isinstance(found, NativeUnavailable):
        raise found
    return found


@cache
def tried_library() -> ctypes.CDLL | NativeUnavailable:
    """The compiled kernels, or why they cannot be had."""
    try:
        return _load(_compiled())
    except NativeUnavailable as reason:
        return reason


@cache
def library_digest() -> str:
    """SHA-256 of the compiled kernels in use. Raises NativeUnavailable where there are none."""
    load_library()
    return hashlib.sha256(_compiled().read_bytes()).hexdigest()


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the compiled kernels could not be loaded: {error}") from None
    library.isthmus_layer_bytes.restype = ctypes.c_int64
    assert library.isthmus_layer_bytes() == ctypes.sizeof(_Layer), "kernels.c and its Python mirror disagree"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.isthmus_layers.argtypes = [pointer, number, pointer, pointer, pointer]
    library.isthmus_head.argtypes = [pointer, pointer, pointer, number, number, number, pointer, ctypes.c_int32]
    return library


def _compiled() -> Path:
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NativeUnavailable("there is no C compiler here; install one (gcc or clang) or name it in $CC")
    known = "\n".join((SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, processor()))
    target = _cache_folder() / f"kernels-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not _is_ours(target):
        _compile(compiler, target)
    return target


def _is_ours(target: Path) -> bool:
    """Whether compiled kernels are there that nobody else can have written, and whole."""
    try:
        facts = target.lstat()
        is_own = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022
        return is_own and target.with_suffix(DIGEST).read_text() == hashlib.sha256(target.read_bytes()).hexdigest()
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus"
    except RuntimeError as error:
        raise NativeUnavailable(f"there is no folder for the compiled kernels ({error}); set XDG_CACHE_HOME") from None


def _compile(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
            if done.returncode:
                raise NativeUnavailable(f"{compiler} could not compile the kernels: {done.stderr.strip()[:500]}")
            made.chmod(0o755)
            digest = Path(folder) / f"{target.name}{DIGEST}"
            digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            digest.replace(target.with_suffix(DIGEST))
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the kernels could not be compiled: {error}") from None


def processor() -> str:
    """What -march=native depends on: a cache folder may be shared by several machines."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    flags = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return "\n".join((platform.machine(), platform.processor(), *flags))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise NativeUnavailable(f"the kernels compute fp32 and W8A8 layers on the CPU, and this model has {what}")


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the intermediate results of a layer")
