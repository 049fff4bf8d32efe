"""What every room may stand on: buckets, the GPU's driver, a thread for now and then, the plural of a word.

It imports the errors and nothing else of ours.
"""
