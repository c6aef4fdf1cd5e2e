"""What reads bytes that others wrote, given bytes that nobody should have written.

`targets` has each reader with inputs for it, and what it may raise. The suite tries some of each;
``python -m tests.fuzz --seconds 600`` tries for as long as it is told. `hostile` makes messages for
the queue of a real worker.
"""
