"""What the engine's time and energy went into: each step is measured, shared among its requests, and priced.

It may import the foundation and the ground floor's borders. It knows nothing of jobs, records or vLLM, but for the
shape of the scheduler that `step_meter` rides in.
"""
