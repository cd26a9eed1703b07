"""
A tiny run that reports to trackers, in a process of its own: they keep what they do per process, and take folders from
the environment. Run as `python -m tests.support.tracked_run FOLDER TRACKER...`; what came of it is written to
`FOLDER/result.json`.
"""

import json
import sys
from pathlib import Path

from tests.support.scenarios import rank_trainer, summary

SETTINGS = {"max_steps": 4, "eval_steps": 2, "eval_on_start": True, "save_strategy": "no", "logging_steps": 1}


def main():
    folder, *trackers = sys.argv[1:]
    results = {}
    for name, report_to in (("untracked", "none"), ("tracked", trackers)):
        trainer = rank_trainer(Path(folder, name), report_to=report_to, project="tests", run_name="tiny", **SETTINGS)
        trainer.train()
        results[name] = summary(trainer)
    if "trackio" in trackers:
        from trackio.sqlite_storage import SQLiteStorage

        results["trackio"] = SQLiteStorage.get_logs("tests", "tiny")
    Path(folder, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
