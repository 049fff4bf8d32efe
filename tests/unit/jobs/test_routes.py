"""The allow-list, held against every route that the sources of the installed vLLM declare."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from coldsnap.errors import InvalidInput, MethodNotAllowed, NotFound, RouteRefused
from coldsnap.jobs import routes

_DECLARED = re.compile(
    r'(?:@\w*(?:router|app)\.(?:get|post|put|delete|patch|websocket)|add_api_route|Mount|\.mount)\(\s*"(/[^"]*)"'
)
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")

_ADMINISTRATIVE = """
    /v1/load_lora_adapter /v1/unload_lora_adapter /sleep /wake_up /is_sleeping /start_profile /stop_profile
    /reset_prefix_cache /reset_mm_cache /reset_encoder_cache /collective_rpc /scale_elastic_ep
    /is_scaling_elastic_ep /server_info /metrics /metrics/ /load /ping /invocations /tokenizer_info /pause
    /resume /is_paused /update_weights /init_weight_transfer_engine /abort_requests /inference/v1/generate
    /docs /docs/oauth2-redirect /redoc /openapi.json
"""
"""What any release of vLLM has had; the installed one's are read from its sources."""


def declared() -> list[str]:
    """Return the routes of vLLM's own server, with `x` for a parameter."""
    spec = find_spec("vllm")  # finds it, without importing it
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "entrypoints"
    sources = (file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    return sorted({re.sub(r"\{.*?\}", "x", path) for text in sources for path in _DECLARED.findall(text)})


DECLARED = declared()


def wrong_method(path: str, method: str) -> MethodNotAllowed | None:
    try:
        routes.check(path, method)
    except MethodNotAllowed as error:
        return error
    return None


def allowed(path: str) -> bool:
    return path in {route.replace("{id}", "x") for route in routes.ALLOWED}


def test_the_routes_of_vllm_were_found() -> None:
    assert {"/v1/chat/completions", "/v1/responses/x/cancel", "/sleep", "/metrics"} < set(DECLARED)
    assert len(DECLARED) > 40


@pytest.mark.parametrize("path", [*_ADMINISTRATIVE.split(), *(path for path in DECLARED if not allowed(path))])
def test_every_other_route_of_vllm_is_refused(path: str) -> None:
    for method in METHODS:
        with pytest.raises(InvalidInput) as raised:
            routes.check(path, method)
        assert type(raised.value) is RouteRefused
        assert raised.value.param == "route"
        assert raised.value.message == f"{path}: not open to jobs"


@pytest.mark.parametrize("path", [path for path in DECLARED if allowed(path)])
def test_every_route_that_serves_the_model_is_open_to_one_method(path: str) -> None:
    refused = [error for method in METHODS if (error := wrong_method(path, method))]
    assert len(refused) == len(METHODS) - 1
    for error in refused:
        assert error.param == "method"
        assert re.fullmatch(rf"[A-Z]+ {path}: expected (GET|POST)", error.message)


def test_the_allow_list_names_nothing_that_vllm_has_not() -> None:
    newer = {"/v1/decisions"}  # of 0.33, which is the CUDA build's; the CPU build stays at 0.32 until there is one
    assert {route.replace("{id}", "x") for route in routes.ALLOWED} - newer <= set(DECLARED)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/v1",
        "/v1/",
        "/v1/models/",
        "//v1/models",
        "/v1//models",
        "/V1/models",
        "/v1/models\n",
        "/v1/models/../../sleep",
        "/v1/models%2f..%2fsleep",
        "/v1/%6dodels",
        "/v1/models?x=1",
        "/v1/models#x",
        "/v1/models;x",
        "/v1/models\0",
        "v1/models",
        "http://localhost/v1/models",
        "/v1/responses/",
        "/v1/responses/a/b",
        "/v1/responses/../sleep",
        "/v1/responses/./cancel/..",
        "/sleepy",
        "/health/x",
        " /health",
    ],
)
def test_a_path_that_is_nearly_one_is_not_known(path: str) -> None:
    for method in METHODS:
        with pytest.raises(NotFound) as raised:
            routes.check(path, method)
        assert raised.value.param == "route"
        assert "/v1/chat/completions" in raised.value.message


@pytest.mark.parametrize("path", ["/v1/responses/resp_0a-9", "/v1/responses/resp_1/cancel"])
def test_a_response_is_addressed_by_its_id(path: str) -> None:
    method = "POST" if path.endswith("cancel") else "GET"
    routes.check(path, method)  # raises what it refuses
    assert routes.method_without_body(path) == method


@pytest.mark.parametrize("path", ["/" + "x" * 10_000_000, "/sleep/" + "x" * 10_000_000])
def test_an_endless_path_makes_a_short_message(path: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        routes.check(path, "GET")
    assert len(raised.value.message) < 1000


def test_an_endless_method_makes_a_short_message() -> None:
    with pytest.raises(MethodNotAllowed) as raised:
        routes.check("/health", "X" * 10_000_000)
    assert len(raised.value.message) < 1000
