"""Prefect flows, MLflow tracking and registry, and the command line, over the core package gptcore."""
