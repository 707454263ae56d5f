.PHONY: fast test lint docs

fast: # tests of less than about ten seconds each
	pytest -m "not slow"

test:
	pytest

lint:
	ruff check .
	ruff format --check .

docs:
	python docs/make_api.py
