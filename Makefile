.PHONY: fast test coverage lint docs

fast: # what shows most mistakes in a minute and a half on two cores; `make test` runs all
	pytest -m "not slow"

test:
	pytest

coverage: # takes longer than the tests alone
	pytest --cov=trl_larpo --cov-fail-under=90

lint:
	ruff check .
	ruff format --check .
	mypy

docs: # the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
