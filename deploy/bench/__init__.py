"""`peregrine bench ...`: measurements as commands. Each writes one JSON object and prints a table."""
