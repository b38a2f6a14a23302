"""`python -m rapidfire_automl.cli` does what `rapidfire-automl` does."""

from rapidfire_automl.cli import app

app()
