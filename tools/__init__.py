"""Commands beside a run: download, benchmark, soak, report, submission."""
