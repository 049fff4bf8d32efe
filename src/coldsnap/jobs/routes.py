"""Which of vLLM's HTTP routes a job may call: those that serve a model, none that administer it.

vLLM decides which of them exist for the model at hand; this table only keeps the others out of reach.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from coldsnap.errors import MethodNotAllowed, NotFound, RouteRefused

ALLOWED: Mapping[str, str] = {
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/chat/completions/batch": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/responses/{id}": "GET",
    "/v1/responses/{id}/cancel": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/cohere/v2/chat": "POST",
    "/generative_scoring": "POST",
    "/v1/decisions": "POST",
    "/v1/systemone": "POST",
    "/v1/embeddings": "POST",
    "/v2/embed": "POST",
    "/v1/score": "POST",
    "/v1/rerank": "POST",
    "/v2/rerank": "POST",
    "/score": "POST",
    "/rerank": "POST",
    "/classify": "POST",
    "/pooling": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/version": "GET",
    "/health": "GET",
}

TOKENIZED: frozenset[str] = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
"""Routes whose text need not fit into the model's context, so that nothing else bounds what it takes to read."""
TOKENIZED_BYTES = 1_000_000

_REFUSED = re.compile(
    r"/(docs|redoc|openapi\.json|static|metrics|load|ping|readyz?|server_info|kv_event_sources|tokenizer_info|"
    r"sleep|wake_up|is_sleeping|release_kv_cache_memory|pause|resume|is_paused|abort_requests|"
    r"(start|stop)_profile|reset_\w+|collective_rpc|(is_scaling|scale)_elastic_ep|fault_tolerance|get_world_size|"
    r"(\w+_)?weights?(_\w+)?|v1/(un)?load_lora_adapter|adapters|v1/audio|v1/realtime|inference|invocations)(/.*)?"
    r"|/.+/(de)?render"
)
"""Routes of vLLM that a job may not call or, as uploads and WebSockets, cannot. Other paths are not known."""

_PATTERNS = [(re.compile(re.sub(r"\{\w+\}", r"[A-Za-z0-9_-]+", route)), method) for route, method in ALLOWED.items()]


_EMPTY_POST = re.compile(r"/v1/responses/[A-Za-z0-9_-]+/cancel")


def method_without_body(path: str) -> str:
    """Return which method a request without a body had: the platform sends a GET and an empty POST alike."""
    return "POST" if _EMPTY_POST.fullmatch(path) else "GET"


def check(path: str, method: str) -> None:
    """Raise an error that says why, unless a job may call `path` with `method`."""
    if _REFUSED.fullmatch(path):  # first: /v1/responses/render is no response's id
        raise RouteRefused(f"{path[:200]}: not open to jobs", param="route")
    for pattern, allowed in _PATTERNS:
        if pattern.fullmatch(path):
            if method != allowed:
                raise MethodNotAllowed(f"{method[:20]} {path[:200]}: expected {allowed}", param="method")
            return
    raise NotFound(f"{path[:200]}: no such route; known: {', '.join(ALLOWED)}", param="route")
