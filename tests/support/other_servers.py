"""Servers that answer as vLLM 0.32 and SGLang 0.5.23 do, computing with a bundle. Their faults are switches."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import read_bundle

END = 1


class Answer(Exception):
    """Ends a request with a status and a body."""

    def __init__(self, status: int, body: Any):
        super().__init__(status)
        self.status, self.body = status, body


class OtherServer:
    """Draws from the model of a bundle; `raw` reports its own log-probabilities. `calls` are the paths asked."""

    def __init__(self, bundle: Path, *, raw: bool = False, logits: bool = False, key: str | None = None):
        self.served, self.raw, self.logits, self.key = bundle, raw, logits, key
        self.model = read_bundle(bundle).build()
        self.version = "default"
        self.calls: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.healthy_after = 0
        self.url = ""
        self._lock = threading.Lock()

    def handle(self, method: str, path: str, query: dict[str, str], body: dict[str, Any] | None) -> Any:
        raise NotImplementedError

    def check_key(self, header: str | None) -> None:
        if self.key is not None and header != f"Bearer {self.key}":
            raise Answer(401, {"error": "Unauthorized"})

    def health(self) -> None:
        if self.healthy_after > 0:
            self.healthy_after -= 1
            raise Answer(503, {"detail": "starting"})

    def longest(self, prompt: list[int], count: int) -> int:
        """Both servers cut an answer where prompt and answer reach the longest sequence."""
        return min(count, self.model.architecture.max_position_embeddings - len(prompt))

    def sample(self, prompt: list[int], count: int, temperature: float, seed: int | None, top: int) -> list[dict]:
        """Token, log-probability and the `top` likeliest alternatives of each step, up to the end token."""
        generator = torch.Generator().manual_seed(seed if seed is not None else torch.seed() % 2**32)
        steps, tokens = [], list(prompt)
        for _ in range(self.longest(prompt, count)):
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens]))[0, -1].double()
            scaled = logits / (temperature or 1.0)
            drawn = torch.softmax(scaled, -1)
            token = int(torch.multinomial(drawn, 1, generator=generator)) if temperature else int(scaled.argmax())
            shown = logits if self.raw else scaled
            shown = shown if self.logits else torch.log_softmax(shown, -1)
            best = shown.topk(top).indices.tolist()
            tokens.append(token)
            steps.append({"id": token, "logprob": shown[token].item(), "top": {i: shown[i].item() for i in best}})
            if token == END:
                break
        return steps

    def scored(self, prompt: list[int]) -> list[tuple[int, float, int, float]]:
        """Of every token but the first: itself, its log-probability, the likeliest token and its."""
        with torch.no_grad():
            rows = torch.log_softmax(self.model(torch.tensor([prompt]))[0].double(), -1)[:-1]
        best = rows.argmax(-1).tolist()
        return [
            (token, row[token].item(), top, row[top].item())
            for token, row, top in zip(prompt[1:], rows, best, strict=True)
        ]

    def load(self, folder: str) -> None:
        """Raises IsthmusError if there is no whole bundle."""
        with self._lock:
            self.model = read_bundle(Path(folder)).build()
            self.served = Path(folder)


class FakeVllm(OtherServer):
    """`dev` stands for VLLM_SERVER_DEV_MODE=1. A reload that fails ends the engine, as it does there; with
    `reload_factor` other than 1 it leaves other weights than it read."""

    def __init__(self, bundle: Path, *, dev: bool = True, owner: str = "vllm", **options: Any):
        super().__init__(bundle, **options)
        self.dev, self.owner, self.paused, self.dead, self.with_ids = dev, owner, False, False, True
        self.reload_factor = 1.0

    def handle(self, method: str, path: str, query: dict[str, str], body: dict[str, Any] | None) -> Any:
        if path == "/health":
            return self.health()
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "served", "owned_by": self.owner, "root": str(self.served)}]}
        if path == "/v1/completions":
            return self.completions(body or {})
        if not self.dev:
            raise Answer(404, {"detail": "Not Found"})
        return self.control(path, query, body or {})

    def completions(self, ask: dict[str, Any]) -> dict[str, Any]:
        if self.dead:
            raise Answer(500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}})
        if ask["model"] != "served":
            raise Answer(404, {"error": {"message": f"The model `{ask['model']}` does not exist.", "code": 404}})
        count = self.model.architecture.vocab_size
        if any(token >= count for prompt in ask["prompt"] for token in prompt):
            raise Answer(400, {"error": {"message": "Token id 99999 is out of vocabulary", "code": 400}})
        if self.model.lm_head.weight.isnan().any():
            raise Answer(400, {"error": {"message": "Out of range float values are not JSON compliant", "code": 400}})
        if ask.get("prompt_logprobs") is not None:
            return {"choices": [self.scored_choice(i, prompt) for i, prompt in enumerate(ask["prompt"])][::-1]}
        n, seed = ask.get("n", 1), ask.get("seed")
        choices = []
        for place, prompt in enumerate(ask["prompt"]):
            for child in range(n):
                own = None if seed is None else seed + child
                steps = self.sample(prompt, ask["max_tokens"], ask["temperature"], own, ask["logprobs"])
                choices.append(self.choice(place * n + child, steps, ask))
        return {"object": "text_completion", "choices": choices[::-1]}

    def scored_choice(self, index: int, prompt: list[int]) -> dict[str, Any]:
        places = [
            {str(i): {"logprob": value, "rank": 1} for i, value in ((top, highest), (token, own))}
            for token, own, top, highest in self.scored(prompt)
        ]
        shown = {"index": index, "text": "", "finish_reason": "length"}
        return shown | ({"prompt_logprobs": [None, *places]} if self.with_ids else {})

    def choice(self, index: int, steps: list[dict], ask: dict[str, Any]) -> dict[str, Any]:
        named = ask.get("return_tokens_as_token_ids", False)
        shown = [
            {
                (f"token_id:{i}" if named else f"t{i}"): v
                for i, v in {**step["top"], step["id"]: step["logprob"]}.items()
            }
            for step in steps
        ]
        return {
            "index": index,
            "text": "",
            "finish_reason": "stop" if steps[-1]["id"] == END else "length",
            "logprobs": {"token_logprobs": [step["logprob"] for step in steps], "top_logprobs": shown},
            "token_ids": [step["id"] for step in steps] if self.with_ids else None,
        }

    def control(self, path: str, query: dict[str, str], ask: dict[str, Any]) -> Any:
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/server_info":
            return {"vllm_config": {"weight_transfer_config": None} if query else "text"}
        if path == "/is_paused":
            return {"is_paused": self.paused}
        if path == "/pause":
            assert query == {"mode": "keep"}
            self.paused = True
            return {"status": "paused"}
        if path == "/resume":
            self.paused = False
            return {"status": "resumed"}
        assert self.paused, f"{path} while running"
        if path == "/collective_rpc":
            assert ask["method"] == "reload_weights"
            return self.reload(ask["kwargs"]["weights_path"])
        if path == "/update_weight_version":
            self.version = ask["new_version"]
            return {"success": True, "new_version": self.version}
        if path == "/reset_prefix_cache":
            return {"success": query.get("reset_running_requests") == "true"}
        raise Answer(404, {"detail": "Not Found"})

    def reload(self, folder: str) -> dict[str, Any]:
        try:
            self.load(folder)
        except IsthmusError as error:
            self.dead = True
            message = f"Call to collective_rpc method failed: Worker failed with error '{error}'"
            raise Answer(500, {"error": {"message": message, "code": 500}}) from error
        self.model.lm_head.weight *= self.reload_factor
        return {"results": [None]}


class FakeSgLang(OtherServer):
    """`broken` makes the next loads fail: a number of them."""

    def __init__(self, bundle: Path, *, deterministic: bool = True, old_routes: bool = False, **options: Any):
        super().__init__(bundle, **options)
        self.deterministic, self.old_routes, self.broken, self.spans = deterministic, old_routes, 0, True

    def handle(self, method: str, path: str, query: dict[str, str], body: dict[str, Any] | None) -> Any:
        if path == "/health":
            return self.health()
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": str(self.served), "owned_by": "sglang"}]}
        if path == ("/get_server_info" if self.old_routes else "/server_info"):
            return {"version": "0.5.23", "enable_deterministic_inference": self.deterministic}
        if path == ("/get_model_info" if self.old_routes else "/model_info"):
            return {"model_path": str(self.served), "is_generation": True, "weight_version": self.version}
        if path == "/generate":
            return self.generate(body or {})
        if path == "/update_weights_from_disk":
            return self.update(body or {})
        raise Answer(404, {"detail": "Not Found"})

    def generate(self, ask: dict[str, Any]) -> list[dict[str, Any]]:
        assert len(ask["input_ids"]) == len(ask["sampling_params"]) and ask["return_logprob"]
        if any(token >= self.model.architecture.vocab_size for prompt in ask["input_ids"] for token in prompt):
            raise Answer(400, {"error": {"message": "The input_ids contain values out of the vocab range"}})
        pairs = zip(ask["input_ids"], ask["sampling_params"], strict=True)
        answers = [self.one(prompt, options, ask.get("top_logprobs_num", 0)) for prompt, options in pairs]
        if ask.get("logprob_start_len") == 0 and ask.get("top_logprobs_num") == 1:
            for prompt, answer in zip(ask["input_ids"], answers, strict=True):
                answer["meta_info"] |= self.scored_facts(prompt)
        return answers

    def scored_facts(self, prompt: list[int]) -> dict[str, Any]:
        found = self.scored(prompt)
        return {
            "input_token_logprobs": [[None, prompt[0], None], *([own, token, None] for token, own, _, _ in found)],
            "input_top_logprobs": [None, *([[highest, top, None]] for _, _, top, highest in found)],
        }

    def one(self, prompt: list[int], options: dict[str, Any], top: int) -> dict[str, Any]:
        seed = options["sampling_seed"] if self.deterministic else None
        steps = self.sample(prompt, options["max_new_tokens"], options["temperature"], seed, top)
        facts = {
            "finish_reason": {"type": "stop", "matched": END} if steps[-1]["id"] == END else {"type": "length"},
            "weight_version": self.version,
            "output_token_logprobs": [[step["logprob"], step["id"], None] for step in steps],
            "output_top_logprobs": [[[value, i, None] for i, value in step["top"].items()] for step in steps],
        }
        if self.spans:
            facts["weight_versions"] = [{"version": self.version, "start": 0, "end": len(steps)}]
        return {"text": "", "output_ids": [step["id"] for step in steps], "meta_info": facts}

    def update(self, ask: dict[str, Any]) -> dict[str, Any]:
        if self.broken:
            self.broken -= 1
            raise Answer(400, {"success": False, "message": "Failed to update weights: out of memory."})
        self.load(ask["model_path"])
        self.version = ask["weight_version"]
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}


class _Handler(BaseHTTPRequestHandler):
    fake: OtherServer

    def do_GET(self) -> None:
        self._answer("GET", None)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer("POST", json.loads(content) if content else None)

    def _answer(self, method: str, body: dict[str, Any] | None) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.fake.calls.append(parts.path)
        self.fake.asked.append(body or {})
        try:
            self.fake.check_key(self.headers.get("Authorization"))
            status, answer = 200, self.fake.handle(method, parts.path, query, body)
        except Answer as given:
            status, answer = given.status, given.body
        content = b"" if answer is None else json.dumps(answer).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(fake: OtherServer) -> Iterator[OtherServer]:
    """The fake behind a URL of its own."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fake.url = f"http://127.0.0.1:{server.server_port}"
        yield fake
        server.shutdown()
