"""What is served, and where it is found: the manifest of a baked model, its verification, its way to and from a bucket.

It may import `foundation` and the settings. It does not know what vLLM does with the files.
"""
