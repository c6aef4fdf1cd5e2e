"""Chaos: many clients on a fleet whose parts keep breaking, checked against what must hold.

``python -m tests.chaos --jobs 50000 --seed 1`` is the long form, ``test_chaos.py`` the short one.

`driver` runs the whole; `fleet` holds the processes and `faults` breaks them; `agents` is the load,
in this process and, by `producer`, in processes of their own; `history` writes down what every
caller did and was told; `checker` finds in it what must not be, and `leftovers` does so in Redis.
"""
