"""The experiments of this project: one method table, one runner, one file of results, one set of tables and figures."""
