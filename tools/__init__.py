"""Commands beside a run: download, benchmark, soak, report, submission."""

import sys

import config

sys.excepthook = config.report_missing_package  # the modules import their packages before `config.run_command` runs
