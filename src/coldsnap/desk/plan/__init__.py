"""Which settings should an endpoint have? `coldsnap plan` replays a trace through a model of the platform.

ledger -> worker model (`calibration`) ; trace + settings -> lives and latencies (`simulation`, `batch`) -> the
cheapest settings (`frontier`) -> terminal (`terminal`), page (`page`)

A tool of the desk: the worker never imports it.
"""
