"""Commands beside a run: download, benchmark, soak, report, submission."""

import config  # noqa: F401 - before the packages of the modules, so that it reports those that cannot be imported
