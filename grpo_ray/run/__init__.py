"""A run's folder: its contents, who may write to it, and how its files stay complete.

Read run_dir.py, then checkpoint_store.py, manifest.py, fragments.py, learner_files.py, saver.py and delivery.py (checkpoints);
ledger.py, sample_columns.py with rollout_log.py and sample_files.py, records.py, eval_record.py and ended.py (records);
kept_groups.py and restored_groups.py (groups that are sampled and not trained), replay.py; ownership.py (who may write).

Imports `telemetry`, `config` and the modules at the root of `grpo_ray`.
"""
