"""The demo: its data and model, and the scripts that make them."""

import config  # noqa: F401 - before the packages of the modules, so that it reports those that cannot be imported
