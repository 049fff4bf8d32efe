"""What a boot has compiled, kept for the next one: bundles of compile caches, by fingerprint, in a folder or a bucket.

It may import `snapshot`, `foundation`, and of `vllm` only the names of its arguments. Whatever fails here costs time
and nothing else.
"""
