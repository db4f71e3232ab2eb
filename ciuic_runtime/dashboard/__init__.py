"""The web page at /dashboard: schedules, planned against actual, and the JSON that it is made of."""
