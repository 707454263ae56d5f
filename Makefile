.PHONY: fast test lint docs

fast: # tests of less than about ten seconds each
	pytest -m "not slow"

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy

docs: # the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
