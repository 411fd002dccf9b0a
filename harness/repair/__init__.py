"""``python -m harness repair DIR``: rebuild the index from the runs' own rows, cut torn lines, merge shards."""

from __future__ import annotations

import argparse
import json
import sys

from harness.exit_codes import BAD_DATA, OK


def repair_command(options: argparse.Namespace) -> int:
    """Repair a results folder and say what was intact and what is lost: exit 4 when something is."""
    from harness.repair.folder import Repair, repair_folder
    from harness.repair.merge import merge
    from harness.repair.terminal import print_repair
    from harness.run_folder import OutputError
    from harness.settings import SettingsError

    for folder in (options.folder, *options.merge):
        if not folder.is_dir() and (folder is not options.folder or not options.merge):
            what = "is a file" if folder.exists() else "does not exist"
            raise SettingsError(f"{folder} {what}; give a results folder, such as results/nvidia-h200")
    merged = Repair(str(options.folder))
    try:
        merge(options.folder, options.merge, merged)
        if not any((options.folder / name).exists() for name in ("runs", "training_logs", "results.jsonl")):
            raise SettingsError(
                f"{options.folder} holds neither runs/ nor training_logs/ nor results.jsonl; give a results "
                "folder, such as results/nvidia-h200"
            )
        done = repair_folder(options.folder)
    except OSError as error:
        raise OutputError(
            f"cannot repair {options.folder}: {error.filename}: {error.strerror}; lines that were intact still are"
        ) from error
    done.merged, done.in_use = merged.merged, sorted({*merged.in_use, *done.in_use})
    done.files = merged.files + done.files
    if options.json:
        json.dump(done.as_json(), sys.stdout)
        sys.stdout.write("\n")
    else:
        print_repair(done)
    return BAD_DATA if done.is_damaged else OK
