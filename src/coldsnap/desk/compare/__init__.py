"""`coldsnap compare`: asks two endpoints the same, and says what differs.

prompts (`prompts`) -> both endpoints, in turn (`asking`, by the client of `desk/bench`) -> figures with intervals
(`figures`) -> terminal, page (`shown`)
"""
