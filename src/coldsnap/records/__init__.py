"""What a worker writes down: the schema of its records, the file, the bucket and the gateway they go to.

It may import `foundation`, the settings and the headings of `cost`. It does not know how the figures came about.
"""
