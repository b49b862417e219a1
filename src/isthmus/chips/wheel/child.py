"""Run as a program, in a process of its own: load a vendor's library, and write down what it registered with torch.

It needs torch and nothing else. Arguments: the library, the file for the answer (JSON), bytes of memory, seconds of
processor time.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

KEYS = {"native": "PrivateUse1", "autograd": "AutogradPrivateUse1", "autocast": "AutocastPrivateUse1"}


def main(library: str, answer: str, memory: str, seconds: str) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    before = {key: kernels(torch, key) for key in KEYS.values()}
    known = set(torch._C._dispatch_get_all_op_names())
    ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
    added = {kind: sorted(kernels(torch, key) - before[key]) for kind, key in KEYS.items()}
    names = torch._C._dispatch_get_all_op_names()
    operators = [describe(torch, name, name in known) for name in sorted(names)]
    Path(answer).write_text(json.dumps({"torch": torch.__version__, "kernels": added, "operators": operators}))


def kernels(torch: Any, key: str) -> set[str]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name for name in torch._C._dispatch_get_all_op_names() if has(name, key)}


def describe(torch: Any, name: str, known: bool) -> dict[str, Any]:
    """How torch would dispatch an operator on the vendor's device.

    `how` is what the dispatcher's table says in its last brackets, `kernel` for example, and `at` the place in the
    source that registered it.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    lines = torch._C._dispatch_dump_table(name).splitlines() if has_schema(torch, name) else []
    line = next((one for one in lines if one.startswith("PrivateUse1:")), "")
    return {
        "name": name,
        "known": known,
        "how": line.rpartition("[")[2].rstrip("] \n") if "[" in line else None,
        "at": line.partition(" registered at ")[2].rpartition(" [")[0],
        "falls_through": "fallthrough" in line,
        "cpu": has(name, "CPU"),
        "via": out_variant(torch, name) if is_structured(torch, name) else None,
        "schema": None if known else schema(torch, name),
    }


def has_schema(torch: Any, name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel(name)) and schema(torch, name) is not None


def schema(torch: Any, name: str) -> str | None:
    head = "schema: "
    lines = torch._C._dispatch_dump(name).splitlines()
    found = next((one.removeprefix(head) for one in lines if one.startswith(head)), None)
    return None if found in (None, "(none)") else found


def is_structured(torch: Any, name: str) -> bool:
    """Whether torch's code generator made the operator, for any device, out of its overload that writes into given
    tensors. Such operators have a generated kernel for the meta device too; others for any device have not."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutogradNonFunctional"):
        return False
    lines = torch._C._dispatch_dump(name).splitlines()
    return any(line.startswith("Meta") and "RegisterMeta" in line for line in lines)


def out_variant(torch: Any, name: str) -> str | None:
    """The overload with the same inputs that writes into given tensors: a functional operator without a kernel of its
    own computes through it."""
    base, _, overload = name.partition(".")
    family = torch._C._jit_get_schemas_for_operator(base)
    own = next((one for one in family if one.overload_name == overload), None)
    named_alike = torch._C._jit_get_schemas_for_operator(base.removesuffix("_"))
    wanted = inputs(own) if own else None
    for other in named_alike:
        writes = any(argument.is_out for argument in other.arguments)
        if writes and inputs(other) == wanted:
            return f"{other.name}.{other.overload_name}" if other.overload_name else other.name
    return None


def inputs(one: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in one.arguments if not argument.is_out]


if __name__ == "__main__":
    main(*sys.argv[1:])
