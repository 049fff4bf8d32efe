"""What every room may stand on: buckets, a thread that does something now and then, the plural of a word.

It imports the errors and nothing else of ours.
"""
