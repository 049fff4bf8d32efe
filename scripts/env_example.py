"""Prints .env.example: the one file to edit for a deployment, with every setting of the worker in it (`make env`)."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from coldsnap.settings import Settings  # noqa: E402 (src is put on the path above)

HEAD = """\
# Copy this file to .env, take away the # before what you set, and deploy with it (README.md, "Deploy").
# One NAME=value a line, without quotes and without spaces: the shell and `docker run --env-file` both read it.

# ── the image: `set -a; . ./.env; set +a`, then `docker buildx bake $TARGET --push` ──

# A target of docker-bake.hcl: demo, qwen3-8b-fp8, qwen3-8b-w4a16, llama-3.1-8b-fp8, mistral-7b-w4a16, bring-your-own.
TARGET=demo
# The repository that it is pushed to, and the end of its tag.
IMAGE=coldsnap
TAG=dev
# bring-your-own: the snapshot's name. It lies in snapshots/ already, or is baked from a model of the hub.
#BAKE_SNAPSHOT=my-model-fp8
#BAKE_MODEL=org/model
#BAKE_REVISION=main
#BAKE_SCHEME=fp8-dynamic

# ── the worker: the endpoint's environment variables ──
"""
VLLM = """\
# ── vLLM: any argument of `vllm serve` in upper case; these are the usual ones ──

# Most tokens of a prompt and its answer together. Default: the model's own.
#MAX_MODEL_LEN=8192
# Share of the GPU's memory that vLLM may take.
#GPU_MEMORY_UTILIZATION=0.92
# GPUs that one copy of the model is spread over.
#TENSOR_PARALLEL_SIZE=2
# fp8 halves the memory of the KV cache.
#KV_CACHE_DTYPE=fp8
# Tool calls, and how the model writes them.
#ENABLE_AUTO_TOOL_CHOICE=true
#TOOL_CALL_PARSER=hermes
# How the model marks its thinking.
#REASONING_PARSER=qwen3
"""


def settings() -> Iterator[str]:
    """Yield a comment and an assignment for each row of the settings' table."""
    for row in Settings.table().splitlines()[2:]:
        variable, default, what = (cell.strip() for cell in row.strip("|").split("|"))
        name = re.findall(r"`(\w+)`", variable)[0]
        plain = "" if "`" in default else default
        yield f"# {what.replace('`', '')}\n#{name}={plain}\n"


if __name__ == "__main__":
    sys.stdout.write(f"{HEAD}\n{''.join(settings())}\n{VLLM}")
