.PHONY: fast test lint docs

fast: # what shows most mistakes in a minute and a half on two cores; `make test` runs all
	pytest -m "not slow"

test:
	pytest

lint:
	ruff check .
	ruff format --check .

docs:
	python docs/make_api.py
