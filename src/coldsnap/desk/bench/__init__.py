"""`coldsnap bench`: puts a load on an endpoint and measures how it fared.

lengths (`lengths`), trace -> calls (`schedule`) -> requests (`prompts`, `dialect`) -> endpoint (`endpoint`, `jobs`)
-> answers (`answer`) -> outcomes (`driver`) -> figures (`figures`) -> terminal, page (`page`, `plots`)

A tool of the desk: the worker never imports it.
"""
