"""Tells what came of a run. Reads the files of a run folder and nothing else: no model, no scale code, no engine.

`read_run` gathers the files, `build_report` turns them into one dictionary (written as report.json), and the
terminal, the HTML page and the comparison of several runs are three views of that dictionary.
"""
