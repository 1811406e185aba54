"""gptflow as a service: servers, deployments, schedules and triggers, and who is told what happens."""
