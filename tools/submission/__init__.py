"""Make a set of results for MLPerf and check it; __main__.py is the command."""
