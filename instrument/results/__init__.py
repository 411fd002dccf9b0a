"""A results folder on disk: what its records are, where its files lie, and everything that reads, writes, repairs and merges
them.

What may live here: `schemas` and `measurements` (the records), `layout` (every path, and the record in every log), `lines` (the
validated reader; what is wrong is named by file and line), `read` (one run, whole), `contents` (a whole folder, as the report
reads it), `files` and `log` (atomic replacement and appended lines), `folder` (a run's writer, rows and index), `claims` (who
executes a run), `repair`, `transfer` (runs on their way to another folder). No measuring and no judging.

It imports no torch, so that `report`, `inspect`, `diff`, `predict` and `repair` start at once and work on a laptop that has no
GPU; disk is the only bridge between the harness and the report.
"""
