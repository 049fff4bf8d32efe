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
    scripts/setup.sh bake
    .venv-bake/bin/python builder/real_model.py none
fi
job=$(cat test_input.json)
if [ -n "$question" ]; then
    job=$(.venv/bin/python -c 'import json, sys
message = {"role": "user", "content": sys.argv[1]}
print(json.dumps({"input": {"messages": [message], "stream": True}}))' "$question")
fi
exec .venv/bin/python handler.py --test_input "$job"
