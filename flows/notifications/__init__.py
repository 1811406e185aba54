"""Messages to people (notify.py) and to Prefect's server (events.py)."""
