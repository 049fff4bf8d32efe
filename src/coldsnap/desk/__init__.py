"""Commands of a desk: `coldsnap serve`, `bench`, `plan`, `report` and `bake`. An image goes without their packages.

They may import every other room; nothing that runs in a worker imports them.
"""
