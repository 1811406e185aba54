"""What every server that gptflow starts has in common: a guard against web pages, and limits on connections."""
