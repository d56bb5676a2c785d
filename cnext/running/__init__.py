"""Running: from a command to a folder of results, and from such folders to tables, reports and exports.

One run: config (what it is), preparing (data, model), runner, training with batches, schedules and precision,
evaluation, results, cost; processes (several that work together), with DeepSpeed zero and zero_blocks.
Its folder: folder, checkpoint, written (shapes of its files), command, digests, fingerprint, environment.
While it goes on: progress, pace, heartbeat, status, event_log, stopping, exhaustion, streams.
Studies: study (``cnext-run``) with flags, mistakes, jobs, parallel, job, launchers, tables, table_formats, compare;
dry_run, forecast.
From folders alone: report/, analysis/, judging with judge_cells, judge_estimates and judge_validation; export,
importing with model_card and reference.
Beside these: doctor with installed; pretrain_tiny/.
"""
