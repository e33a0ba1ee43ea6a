"""A run's folder: what is in it, who writes there, and how all of it stays whole.

Read run_dir.py, then checkpoint_store.py, manifest.py, fragments.py, learner_files.py, saver.py and delivery.py (checkpoints);
ledger.py, rollout_log.py, sample_files.py, records.py, eval_record.py and ended.py (records); kept_groups.py and
restored_groups.py (what is sampled and not trained), replay.py; ownership.py says who may write.

Imports `telemetry`, `config` and the modules at the root of `grpo_ray`.
"""
