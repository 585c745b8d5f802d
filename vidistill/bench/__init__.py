"""Speed, latency and cost, measured side by side or counted."""
