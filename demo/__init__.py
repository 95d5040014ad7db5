"""The demo: its data and model, and the scripts that make them."""
