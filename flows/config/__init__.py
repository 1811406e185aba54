"""The file pipelines.yaml: pipelines, their schedules and their triggers, read and checked without heavy imports."""
