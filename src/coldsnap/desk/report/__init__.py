"""What did it cost? `coldsnap report` reads ledgers and answers, on the terminal and as a page.

lines (`source`) -> tables (`store`) -> figures (`figures`) -> terminal (`terminal`), page (`page`, `plots`)

A tool of the desk: the worker never imports it.
"""
