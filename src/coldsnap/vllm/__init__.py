"""The only room that knows vLLM: it boots the engine, calls it, and turns what it says into our own data.

It may import `cost`, whose meter rides in vLLM's scheduler, and the ground floor's borders (`engine`, `errors`). It
does not know what a job is, where a snapshot comes from, or that a platform exists.
"""
