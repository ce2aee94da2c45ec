"""Runs and sweeps as web pages: HTML, charts, and a demo in the browser."""
