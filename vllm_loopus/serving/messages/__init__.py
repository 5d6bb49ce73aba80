"""What scheduler and worker tell each other, and what both tell the front end."""
