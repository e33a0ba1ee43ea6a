"""TRL's GRPOTrainer on a task of `addition.py`, on its own: the peer's side of `make bench-versus`.

    python -m tests.bench.versus_trl vllm|transformers TASK MODEL STEPS OUT [--micro-batch N] [--goal ACCURACY]

The same model, prompts in the same order, rewards, sampling, optimizer and objective as in `addition.yaml`: loss_type grpo,
rewards scaled by the standard deviation of their group, no KL, one update a batch. `vllm` is its colocated engine,
`transformers` its default generation.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.bench.addition import TASKS, correct, rows, well_formed
from tests.bench.versus_steps import StepLog

PROMPTS, GROUP = 32, 8
EVAL_EVERY, EVAL_PROMPTS = 5, 256


def run_engine_on_cpu(max_num_seqs: int) -> None:
    """TRL's sync calls `load_weights`, which fails on vLLM's CPU build: linear weights are packed there, and have lost their
    loader. The same stream of weights through vLLM's layerwise reload. A tied output layer keeps a packed copy of its own, which
    the reload leaves as it was."""
    import trl.generation.vllm_generation as generation
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    def sync_weights(self: Any) -> None:
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        with torch.no_grad():
            initialize_layerwise_reload(runner.model)
            runner.model.load_weights(self._iter_named_params())
            finalize_layerwise_reload(runner.model, runner.model_config)
            for module in runner.model.modules():
                if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)
        self.llm.reset_prefix_cache()

    engine = generation.LLM
    generation.VLLMGeneration.sync_weights = sync_weights
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": max_num_seqs}
    generation.LLM = lambda **given: engine(**{**given, **options})


class Recorder(TrainerCallback):
    """A line a step, and the end of the run at the goal."""

    def __init__(
        self, log: StepLog, goal: float | None, tokenizer: Any, held_out: list[dict[str, str]], length: int
    ) -> None:
        self.log, self.goal, self.tokenizer, self.held_out, self.length = log, goal, tokenizer, held_out, length
        self.tokens = 0

    def correct(
        self, completions: list[Any], answer: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        self.tokens += sum(len(ids) for ids in completion_ids)
        return correct(completions, answer)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        ended, tokens, self.tokens = time.time(), self.tokens, 0
        metrics = {}
        if self.goal is not None and state.global_step % EVAL_EVERY == 0:
            accuracy = self._accuracy(model)
            metrics = {"eval/accuracy": accuracy, "time/eval": time.time() - ended}
            control.should_training_stop |= accuracy >= self.goal
        self.log.step(state.global_step, tokens, ended=ended, **metrics)

    @torch.no_grad()
    def _accuracy(self, model: Any) -> float:
        """One sample a prompt at T = 1."""
        training, state = model.training, torch.get_rng_state()
        model.eval()
        chats = [[{"role": "user", "content": row["prompt"]}] for row in self.held_out]
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        out = model.generate(**inputs, max_new_tokens=self.length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        model.train(training)
        torch.set_rng_state(state)
        texts = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(correct(texts, [row["answer"] for row in self.held_out])) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("vllm", "transformers"))
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("model")
    parser.add_argument("steps", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--micro-batch", type=int, default=64, help="samples of one forward and backward")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--goal", type=float, help="held-out accuracy at which to end")
    options = parser.parse_args()
    task = TASKS[options.task]
    if options.engine == "vllm":
        run_engine_on_cpu(PROMPTS * GROUP)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    held_out = rows(options.task, "held_out")[:EVAL_PROMPTS]
    log = StepLog(options.out)
    recorder = Recorder(log, options.goal, tokenizer, held_out, task.max_completion_length)
    engine: dict[str, Any] = {}
    if options.engine == "vllm":
        engine = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": task.max_prompt_length + task.max_completion_length,
            "vllm_gpu_memory_utilization": 0.1,
            "vllm_importance_sampling_correction": False,
        }
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        reward_funcs=[recorder.correct, well_formed],
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
                for row in rows(options.task, "train")
            ]
        ),
        processing_class=tokenizer,
        callbacks=[recorder],
        args=GRPOConfig(
            output_dir=str(options.out.parent / "trainer"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=1,
            shuffle_dataset=False,
            max_steps=options.steps,
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=PROMPTS * GROUP // options.micro_batch,
            num_generations=GROUP,
            max_completion_length=task.max_completion_length,
            temperature=1.0,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            loss_type="grpo",
            beta=0.0,
            reward_weights=[1.0, 0.1],
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            **engine,
        ),
    )
    trainer.train()
    log.close()


if __name__ == "__main__":
    main()
