"""One stage: what it is made of, how it runs on the host, and what is written down of it."""
