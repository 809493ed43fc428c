"""The portable kernel: a Triton template for GPUs from sm_80 on, with Inductor's fused epilogues.

Device functions are in `device.py`, the template around them in `template.py`, tile shapes in
`configuration.py`, Inductor's lowerings in `inductor.py`, and what an op of the graph expands to in
`expansion.py`.
"""
