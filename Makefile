# make smoke   sets everything up and trains a tiny model for real, on any machine
# make test    sets everything up and runs the tests
# make bench   the tables of the README
.PHONY: smoke pretrained models r1 test test-long test-all test-cluster chaos soak recovery mutants lint bench bench-versus bench-to-accuracy bench-learning bench-side-by-side bench-simulate bench-sync bench-loading bench-learner bench-growth bench-sample bench-gpu gpu-installs gpu-kit bench-sandbox bench-verifiers lock bench-routing models-train episodes help
.DEFAULT_GOAL := help
BIN := .venv/bin
# Set in many images; without bytecode every worker process compiles its packages again.
unexport PYTHONDONTWRITEBYTECODE

.venv/.ready: pyproject.toml lock-cpu.txt lock-gpu.txt launch/install.sh
	@bash launch/install.sh

smoke: .venv/.ready  ## train a tiny model from a cold start to 90% of its task (a few minutes on two cores)
	@$(BIN)/grpo-ray smoke

episodes: .venv/.ready  ## tiny models learn in environments over several turns, from a cold start (ten minutes on two cores)
	@$(BIN)/grpo-ray episodes

pretrained: .venv/.ready  ## train a real model, SmolLM2-135M-Instruct, on word problems (20 minutes on two cores, 12 GB of memory)
	@$(BIN)/grpo-ray pretrained

r1: .venv/.ready  ## DeepSeek-R1's recipe from a random model to its last stage, on two cores (SEEDS="1 2 3": three times)
	@for seed in $(or $(SEEDS),1); do $(BIN)/grpo-ray pipeline r1_tiny seed=$$seed name=r1-tiny-$$seed || exit 1; done

test: .venv/.ready  ## the tests (a quarter of an hour on two cores)
	@$(BIN)/pytest -m "not long and not slow and not gpu"

test-long: .venv/.ready  ## more of them, with real learners, engines and runs (25 minutes)
	@$(BIN)/pytest -m "long and not slow and not gpu"

test-all: .venv/.ready  ## all of them: the slow ones too, and those for GPUs where there is one
	@$(BIN)/pytest

chaos: .venv/.ready  ## runs in which processes are killed and stopped, a node cut off (an hour; CHAOS_SEEDS=n random schedules, 10)
	@$(BIN)/pytest tests/chaos

soak: .venv/.ready  ## an hour of training with a kill a minute: what the run holds is flat (MINUTES=n)
	@$(BIN)/python -m tests.chaos.soak --minutes $(or $(MINUTES),60)

recovery: .venv/.ready  ## how long a run needs after each kind of death, five times each (40 minutes)
	@$(BIN)/python -m tests.chaos.recovery

test-cluster: .venv/.ready  ## a Ray cluster of several nodes on this machine: workers come and go, a node dies (20 minutes)
	@$(BIN)/pytest -s tests/end_to_end/test_cluster.py tests/end_to_end/test_scale.py

mutants: .venv/.ready  ## small mistakes put into the code, and whether a fast test notices (SAMPLE=400 of each part, or all; MUTANTS='grpo_ray.algorithm.losses.*': these)
	@$(BIN)/python -m tests.mutants $(if $(MUTANTS),$(MUTANTS),--sample $(or $(SAMPLE),400))

models: .venv/.ready  ## every causal model class of Transformers, small: the learner's path against the class's own forward (ten minutes; KINDS="qwen3 mamba2": these)
	@$(BIN)/python -m tests.models.table $(KINDS)

models-train: .venv/.ready  ## families that vLLM samples on CPUs: two steps of each, small, in both precisions, and its export loaded (an hour; KINDS="gemma2 smolvlm": these)
	@$(BIN)/python -m tests.models.train_table $(KINDS)

lint: .venv/.ready  ## ruff, mypy, import layers, dead code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/vulture

bench: .venv/.ready  ## the tables of the README
	@$(BIN)/python -m tests.bench

bench-versus: .venv/.ready  ## a training step against TRL's, and against what the hardware allows (an hour and more on two quiet cores)
	@$(BIN)/python -m tests.bench.versus

bench-to-accuracy: .venv/.ready  ## seconds to the same held-out accuracies, against TRL with vLLM and without (80 minutes on two quiet cores)
	@$(BIN)/python -m tests.bench.versus --to-accuracy

bench-sync: .venv/.ready  ## a weight sync of 500 MB to two engines that sample (three minutes)
	@$(BIN)/python -m tests.bench.sync

bench-loading: .venv/.ready  ## host memory of four learners that load 1 GB under ZeRO-3, before and after (15 GB of memory, ten minutes)
	@$(BIN)/python -m tests.bench.loading

bench-learner: .venv/.ready  ## the learner's update beside its bare passes, page faults and cores used (MODEL=folder; without it a small random model, five minutes)
	@$(BIN)/python -m tests.bench.learner $(MODEL)

bench-routing: .venv/.ready  ## the mismatch of tiny mixtures of experts with kept routes and without (ten minutes)
	@$(BIN)/python -m tests.bench.routing

bench-growth: .venv/.ready  ## seconds and memory over sequence length, model size and group size (five minutes)
	@$(BIN)/python -m tests.bench.growth

bench-sample: .venv/.ready  ## offline sampling against bare vLLM (ten minutes)
	@$(BIN)/python -m tests.bench.sample

bench-gpu: .venv/.ready  ## Qwen2.5-1.5B's shape on one GPU, sampler and learner in turns, against bare vLLM (needs 40 GB)
	@$(BIN)/python -m tests.bench.gpu

gpu-installs: .venv/.ready  ## ten fresh installs of lock-gpu.txt, and imported in each what engines import on GPUs (no GPU; 20 GB, half an hour)
	@$(BIN)/python -m tests.gpu.installs

gpu-kit: .venv/.ready  ## pack the checks for a bare machine with a GPU into .kit/ (downloads 500 MB, ten minutes; tests/gpu/kit)
	@$(BIN)/python -m tests.gpu.kit.pack

bench-learning: .venv/.ready  ## the smoke task by seven algorithms, three seeds each (two hours on two cores)
	@$(BIN)/python -m tests.bench.learning

bench-side-by-side: .venv/.ready  ## GRPO, PPO and DPO on the smoke task with as many samples each (20 minutes on two cores)
	@$(BIN)/python -m tests.bench.side_by_side

bench-simulate: .venv/.ready  ## the controller with 1,024 samplers and 256 learners, simulated (a quarter of an hour)
	@$(BIN)/python -m tests.bench.simulate

bench-sandbox: .venv/.ready  ## 10,000 ordinary programs through the sandbox: right scores, and how many a second (10 minutes)
	@$(BIN)/python -m tests.bench.sandbox

bench-verifiers: .venv/.ready  ## 1,000 answers through reasoning-gym's verifiers in their sandbox, and without it (a minute)
	@$(BIN)/python -m tests.bench.verifiers

# uv does not read pip's find-links, where torch's build for CPUs may lie.
lock: export UV_FIND_LINKS ?= $(shell $(BIN)/python -m pip config get global.find-links 2>/dev/null | tr ' ' ',')
lock: .venv/.ready  ## resolve pyproject.toml into the lock files again, for every Python that is taken
	@$(BIN)/python -m launch.lock

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18
