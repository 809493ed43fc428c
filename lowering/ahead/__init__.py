"""The link works ahead: remote rows of a step's products are copied before the products need them.

Inductor may reorder products, so the order of a step is learned from a call of the graph
(`sequence`), planned (`planning`), and played at later calls (`step`, `player`). A call that
does not follow the order is served as it is without all this: correctness never depends on the
order.
"""
