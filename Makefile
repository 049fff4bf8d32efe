# `make` alone lists the commands. `make demo PYTHON=python3.12` takes another interpreter than python3.
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
export PYTHON
py := .venv/bin/python

.PHONY: help demo test test-engine test-others test-image faults hostile real real-check families check gpu-seam gpu-acceptance image-check desk-check format lock schema env snapshot clean
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## set up .venv and answer test_input.json on the real engine, or: MODEL=smollm2 ASK="…"
	@scripts/demo.sh "$$MODEL" "$$ASK"

real: ## fetch SmolLM2-135M-Instruct and bake it in every scheme, into .coldsnap/real
	@scripts/setup.sh bake
	@.venv-bake/bin/python builder/real_model.py

real-check: ## fetch SmolLM2-135M-Instruct, boot it and ask
	@scripts/setup.sh test
	@$(py) builder/real_model.py none
	@$(py) -m pytest -q tests/real

test: ## set up .venv and run the tests, in two halves side by side
	@scripts/setup.sh test
	@scripts/setup.sh bake
	@echo "coldsnap: two halves of the tests run side by side; each prints how it went at its end"
	@$(MAKE) --output-sync=target --keep-going --jobs=2 test-engine test-others

test-engine:
	@$(py) -m pytest -q tests/engine

test-others:
	@$(py) -m pytest -q tests/loopback tests/unit
	@HANDLER=tests/engine/asynchronous.py $(py) -m pytest -q tests/engine/test_ledger.py tests/engine/test_cancel.py tests/engine/test_openai.py

test-image: ## run the tests on the real engine once more, on workers restored from a process image
	@scripts/setup.sh test
	@HANDLER=tests/engine/restored.py $(py) -m pytest -q tests/engine

faults: ## break what can break; write docs/reliability.md
	@scripts/setup.sh test
	@$(py) bench/faults.py

hostile: ## send the worker ten thousand hostile jobs, and Hypothesis' own
	@scripts/setup.sh test
	@HOSTILE=1 $(py) -m pytest -q -rP tests/engine/test_hostile.py tests/engine/test_bombs.py

families: ## bake and serve tiny checkpoints of many families; write docs/families.md
	@scripts/setup.sh demo
	@scripts/setup.sh bake
	@.venv-bake/bin/python builder/families.py

check: ## formatting, lint, types, the list of files
	@scripts/setup.sh test
	@$(py) -m ruff format --check --quiet .
	@$(py) -m ruff check --quiet .
	@$(py) -m mypy
	@$(py) scripts/check_tree.py

gpu-seam: ## check vLLM's CUDA build on pretended GPUs; write docs/gpu.md
	@scripts/setup.sh test
	@scripts/setup.sh gpu-seam
	@$(py) -m pytest -q -o timeout=900 tests/gpu

gpu-acceptance: ## run every step of bench/gpu_acceptance.py on the CPU engine, with a tiny model
	@scripts/setup.sh test
	@ACCEPTANCE=all $(py) -m pytest -q tests/engine/test_gpu_acceptance.py

image-check: ## build the CPU image, run the demo job in it, search it for secrets (root)
	@scripts/setup.sh demo
	@$(py) scripts/image_check.py

desk-check: ## test `coldsnap serve` with a browser and Prometheus, installed where missing (root)
	@scripts/setup.sh test
	@scripts/desk_tools.sh
	@$(py) -m pytest -q tests/programs

format: ## format, and fix what ruff can fix
	@scripts/setup.sh test
	@$(py) -m ruff format .
	@$(py) -m ruff check --fix .

schema: ## write docs/records.schema.json again
	@mkdir -p docs
	@PYTHONPATH=src $(py) -m coldsnap.records.schema >docs/records.schema.json

env: ## write .env.example again
	@$(py) scripts/env_example.py >.env.example

snapshot: ## train, quantise and write snapshots/demo again
	@scripts/setup.sh bake
	@.venv-bake/bin/python builder/demo_model.py

# No index address, host name or path gets into a lock; pins stay as they are unless UPGRADE=1. A package that both
# builds of vLLM need has one version, which tools.lock and dev.lock go beside: cpu.lock prefers gpu.lock's.
compile := UV_CUSTOM_COMPILE_COMMAND="make lock" scripts/uv.sh pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-emit-find-links $(if $(UPGRADE),--upgrade)
override := --overrides requirements/overrides
lock: ## compile requirements/*.in to *.lock (UPGRADE=1 takes the newest)
	@$(compile) requirements/installer.in -o requirements/installer.lock
	@$(compile) $(override).txt requirements/gpu.in -o requirements/gpu.lock
	@cat requirements/gpu.lock requirements/cpu.lock >requirements/cpu.preferred
	@$(compile) $(override).txt $(override)-cpu.txt requirements/cpu.in -o requirements/cpu.preferred
	@mv requirements/cpu.preferred requirements/cpu.lock
	@$(compile) $(override).txt -c requirements/gpu.lock requirements/base.in -o requirements/base.lock
	@$(compile) -c requirements/cpu.lock -c requirements/gpu.lock requirements/tools.in -o requirements/tools.lock
	@$(compile) -c requirements/cpu.lock -c requirements/gpu.lock -c requirements/tools.lock requirements/dev.in -o requirements/dev.lock
	@$(compile) $(override)-cpu.txt requirements/bake.in requirements/torch-cpu.in -o requirements/bake.lock
	@$(compile) --no-deps -c requirements/bake.lock requirements/real.in -o requirements/real.lock

clean: ## remove the environments, tools and caches (not the ledger)
	@rm -rf .venv .venv-bake .venv-gpu build .tools .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
