#!/usr/bin/env bash
# Sets up, and answers a question on the real engine: scripts/demo.sh [demo|smollm2] [QUESTION]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:-demo} question=${2:-}
unset MODEL ASK # make's variables; the worker would take MODEL for vLLM's argument

case $model in
    demo) ;;
    smollm2) export SNAPSHOT_DIR=.coldsnap/real/none ;;
    *) echo "coldsnap: MODEL: expected demo or smollm2, found $model" >&2 && exit 1 ;;
esac
scripts/setup.sh demo
if [ "$model" = smollm2 ] && [ ! -d "$SNAPSHOT_DIR" ]; then
    .venv/bin/python builder/real_model.py none
fi
job=$(cat test_input.json)
if [ -n "$question" ]; then
    job=$(.venv/bin/python -c 'import json, sys
messages, sampling = [{"role": "user", "content": sys.argv[1]}], {"temperature": 0, "max_tokens": 256}
print(json.dumps({"input": {"messages": messages, "sampling_params": sampling, "stream": True}}))' "$question")
fi
# A process of its own: a cold start counts from the kernel's start of the process, and this one has set things up.
./coldsnap-start --test_input "$job"
