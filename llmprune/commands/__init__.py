"""One module a command; :mod:`llmprune.cli` puts them together."""
