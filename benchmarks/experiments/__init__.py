"""Experiments: questions that take hours, each a module to run by ``python -m``, with a result that is committed."""
