"""What the commands of `gptflow` do and print."""
